"""Views of two concepts side by side: each cut out of one of its photos, on a plain background or a picture.

Photos show one subject each, so jointly trained concepts otherwise never meet, and in one image each takes on the looks
of the other (Han et al. 2023, SVDiff, section 3.2, where such views are called Cut-Mix).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from customdiff.config import Concept, Params
from customdiff.preparation import backgrounds
from customdiff.preparation.masks import SubjectMask, subject_masks
from customdiff.sources.instance_images import instance_paths

WIDTH, HEIGHT = 0.46, 0.6  # the largest a subject is drawn, as shares of the view's side
SIZES = (0.8, 1.0)  # of the largest size
MARGIN = 0.1  # share of the view's side that is left free above and below
JOINTS = (" and a ", " next to a ")

T = TypeVar("T")


@dataclass(frozen=True)
class Cutout:
    """A subject without its background, cropped to its mask.

    Attributes:
        image: RGB.
        coverage: of the same size, 8-bit grey, 255 on the subject, with a soft edge.
    """

    image: Image.Image
    coverage: Image.Image

    def scaled(self, width: float, height: float) -> "Cutout":
        """As large as fits into `width` x `height` px."""
        scale = min(width / self.image.width, height / self.image.height)
        size = (max(1, int(scale * self.image.width)), max(1, int(scale * self.image.height)))
        return Cutout(*(part.resize(size, Image.Resampling.BICUBIC) for part in (self.image, self.coverage)))


def cut_out(path: Path, mask: SubjectMask | None) -> Cutout | None:
    """The subject of a photo; None without a mask, or if the photo's edge cuts the subject."""
    if mask is None:
        return None
    rows, columns = np.nonzero(mask.coverage > 0.05)
    box = (int(columns.min()), int(rows.min()), int(columns.max() + 1), int(rows.max() + 1))
    height, width = mask.coverage.shape
    if box[0] == 0 or box[1] == 0 or box[2] == width or box[3] == height:
        return None
    with Image.open(path) as file:
        image = file.convert("RGB").crop(box)
    coverage = np.round(255 * backgrounds.feathered(mask.coverage)).astype(np.uint8)
    return Cutout(image, Image.fromarray(coverage).crop(box))


@dataclass(frozen=True)
class Company:
    """What the subject of a concept's photos is shown beside.

    Attributes:
        concept: whose photos they are.
        others: other concepts, each with at least one cut-out.
    """

    concept: Concept
    others: Sequence[tuple[Concept, Sequence[Cutout]]]

    @classmethod
    def of(cls, params: Params, name: str, folders: Mapping[str, Path], device: torch.device) -> "Company | None":
        """The company of the concept `name`; None without `prepare.together`, or if no other subject can be cut out.

        Args:
            folders: of the instance images of other concepts (data/instances/<concept>).

        Raises:
            UserError: the segmenter cannot be loaded, or does not know a class.
        """
        others = []
        for other, folder in folders.items() if params.prepare.together else ():
            concept, paths = params.concepts[other], instance_paths(folder)
            found = subject_masks(paths, concept.class_prompt, params.prepare, device)
            cutouts = [cut_out(path, found[path].mask) for path in paths if path in found]
            if whole := [cutout for cutout in cutouts if cutout]:
                others.append((concept, whole))
        return cls(params.concepts[name], others) if others else None

    def beside(
        self, own: Cutout, name: str, side: int, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray, str]:
        """A subject and one of the others, drawn at random, left and right of one another.

        Args:
            own: a subject of `concept`.
            name: the background; see `backgrounds`.
            side: of the image, px.

        Returns:
            The RGB image; the share of each pixel that the subjects cover, (side, side) float32; the caption, such as
            `photo of a <new1> cat next to a <new2> teapot on a red background`. Either is named first.
        """
        companion, cutouts = _one_of(self.others, rng)
        image = Image.fromarray(np.round(backgrounds.picture(name, side, side, rng)).astype(np.uint8))
        coverage = Image.new("L", (side, side))
        for cutout, left in zip(_shuffled(own, _one_of(cutouts, rng), rng), (0, side // 2), strict=True):
            drawn, corner = _placed(cutout, left, side, rng)
            image.paste(drawn.image, corner, drawn.coverage)
            coverage.paste(drawn.coverage, corner)
        first, second = _shuffled(self.concept, companion, rng)
        caption = backgrounds.caption_on(name, first, _one_of(JOINTS, rng) + second.subject)
        return image, np.asarray(coverage, np.float32) / 255, caption


def _placed(cutout: Cutout, left: int, side: int, rng: np.random.Generator) -> tuple[Cutout, tuple[int, int]]:
    """A cut-out at a random size, and its corner at a random place in the half of the view that begins at `left` px."""
    size, margin = side * rng.uniform(*SIZES), round(MARGIN * side)
    drawn = cutout.scaled(size * WIDTH, size * HEIGHT)
    free = (side // 2 - drawn.image.width, side - 2 * margin - drawn.image.height)
    return drawn, (left + int(rng.integers(0, free[0] + 1)), margin + int(rng.integers(0, free[1] + 1)))


def _one_of(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]


def _shuffled(one: T, other: T, rng: np.random.Generator) -> tuple[T, T]:
    return (one, other) if rng.uniform() < 0.5 else (other, one)
