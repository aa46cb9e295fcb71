"""Subject masks of instance images: those they brought with them, else by a segmenter; bad ones are set aside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from customdiff.config import Prepare
from customdiff.preparation.segmenter import Segmenter
from customdiff.sources.masks import stored_masks

SMALLEST, LARGEST = 0.005, 0.95  # shares of a photo
EDGE = 0.5  # share of an edge from which the mask touches it
SECOND = 0.4  # area of the second part, relative to the largest, from which it may be another subject


@dataclass(frozen=True)
class SubjectMask:
    """Where a photo shows its subject.

    Attributes:
        coverage: (H, W) float32 in [0, 1], as large as the photo; 1 on the subject.
        origin: alpha, file or segmenter.
    """

    coverage: np.ndarray
    origin: str


@dataclass(frozen=True)
class FoundMask:
    """The mask of one photo, and what is wrong with it: with a problem and no mask, the mask was set aside."""

    mask: SubjectMask | None = None
    problem: str = ""


def subject_masks(
    paths: Sequence[Path], class_prompt: str, settings: Prepare, device: torch.device
) -> dict[Path, FoundMask]:
    """The masks of instance images that lie in one folder, as `prepare.masks` says.

    The segmenter is loaded only if a photo brought no mask, or an alpha channel that is useless as one, such as that of
    rounded corners.

    Raises:
        UserError: the segmenter cannot be loaded, or does not know the class.
    """
    name = settings.segmentation_model
    if name is None or not paths:
        return {}
    brought = stored_masks(paths[0].parent)
    found = {path: _read(*brought[path.name]) for path in paths if path.name in brought}
    found = {path: mask for path, mask in found.items() if mask.mask or brought[path.name][1] != "alpha"}
    if rest := [path for path in paths if path not in found]:
        key = "prepare.segmenter" if settings.masks == "auto" else "prepare.masks"
        segmenter = Segmenter(name, device, key=key)
        images = (_rgb(path) for path in rest)
        for path, coverage in zip(rest, segmenter.masks(images, class_prompt), strict=True):
            found[path] = _checked(SubjectMask(coverage, "segmenter"))
    return found


def problem_of(coverage: np.ndarray) -> str:
    """What makes a mask (H, W) useless, in a few words; empty if nothing does."""
    subject = coverage > 0.5
    share = subject.mean()
    if share < SMALLEST:
        return "it is empty"
    if share > LARGEST:
        return "it covers nearly the whole photo"
    edges = (subject[0], subject[-1], subject[:, 0], subject[:, -1])
    if sum(edge.mean() > EDGE for edge in edges) >= 3:
        return "it touches three edges of the photo; is it inverted?"
    return ""


def has_two_parts(coverage: np.ndarray) -> bool:
    """Whether a mask (H, W) has a second part that is not much smaller than the largest."""
    labels, parts = ndimage.label(coverage > 0.5)
    areas = np.sort(np.bincount(labels.ravel(), minlength=parts + 1)[1:])
    return parts > 1 and bool(areas[-2] >= SECOND * areas[-1])


def _checked(mask: SubjectMask) -> FoundMask:
    if problem := problem_of(mask.coverage):
        return FoundMask(problem=f"mask from {mask.origin} set aside: {problem}")
    if has_two_parts(mask.coverage):
        return FoundMask(mask, "the mask has two parts of similar size; does the photo show two subjects?")
    return FoundMask(mask)


def _read(path: Path, origin: str) -> FoundMask:
    with Image.open(path) as image:
        return _checked(SubjectMask(np.asarray(image.convert("L"), np.float32) / 255, origin))


def _rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
