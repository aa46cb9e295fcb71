"""Instance and class images with their captions; instance images also with masks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from customdiff.config import Concept, Prepare
from customdiff.errors import UserError
from customdiff.preparation import backgrounds
from customdiff.preparation.captions import Caption, instance_captions
from customdiff.preparation.masks import FoundMask, SubjectMask, subject_masks
from customdiff.sources.instance_images import instance_paths


@dataclass(frozen=True)
class Example:
    """An image file, its caption, and for an instance image what its views on other backgrounds are made of.

    Attributes:
        mask: the subject's; None where it is not known.
        captions_on: the captions of views on other backgrounds, by background; empty where every view keeps its own.
        notes: where caption and mask come from, and warnings, one line each.
    """

    path: Path
    caption: str
    mask: SubjectMask | None = None
    captions_on: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def instance_examples(
    folder: Path,
    concept: Concept,
    settings: Prepare,
    device: torch.device,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    all_masks: bool = False,
) -> list[Example]:
    """Instance images in `folder` (data/instances/<concept>), with captions that contain the modifier token.

    Args:
        tokenizer: the base model's, which limits the length of captions; None: any length.
        all_masks: find the masks of all photos (the masked loss), not only of those that get other backgrounds.

    Raises:
        UserError: there are no images, a caption is wrong or missing, or the captioner or segmenter cannot be loaded.
    """
    paths = instance_paths(folder)
    captions = dict(zip(paths, instance_captions(paths, concept, settings, device, tokenizer), strict=True))
    varied = {path for path, caption in captions.items() if _is_varied(caption, settings)}
    wanted = [path for path in paths if all_masks or path in varied]
    masks = subject_masks(wanted, concept.class_prompt, settings, device)
    return [_example(path, captions[path], masks.get(path), path in varied, concept, settings) for path in paths]


def _is_varied(caption: Caption, settings: Prepare) -> bool:
    """Whether a share of a photo's views is to show other backgrounds, given a mask."""
    return settings.backgrounds.share > 0 and (settings.backgrounds.captioned or caption.origin != "sidecar")


def _example(
    path: Path, caption: Caption, found: FoundMask | None, varied: bool, concept: Concept, settings: Prepare
) -> Example:
    mask, text = found.mask if found else None, caption.text
    captions_on: dict[str, str] = {}
    notes = [f"caption: {caption.origin}", *(f"warning: {warning}" for warning in caption.warnings)]
    if mask:
        notes.append(f"mask: {mask.origin}, {mask.coverage.mean():.0%} of the photo")
        if found and found.problem:
            notes.append(f"warning: {found.problem}")
        if varied:
            captions_on = {
                name: backgrounds.caption_on(name, concept) for name in backgrounds.names(settings.backgrounds)
            }
            notes.append(f"{settings.backgrounds.share:.0%} of its views on other backgrounds")
        if mask.origin == "alpha" and caption.origin == "template":  # transparent parts were stored as white
            text = backgrounds.caption_on("white", concept)
    elif found:
        notes.append(f"warning: {found.problem}; the photo is used whole")
    else:
        notes.append("mask: none")
    return Example(path, text, mask, captions_on, tuple(notes))


def class_examples(folder: Path, concept: Concept, settings: Prepare) -> list[Example]:
    """Class images in `folder` (data/classes/<concept>, in the reference's layout), with their captions.

    Raises:
        UserError: images.txt and caption.txt differ in their number of lines.
    """
    names = (folder / "images.txt").read_text(encoding="utf-8").splitlines()
    captions = (folder / "caption.txt").read_text(encoding="utf-8").splitlines()
    if len(names) != len(captions):
        raise UserError(
            f"{folder}: images.txt has {len(names)} lines and caption.txt {len(captions)}; "
            "run `dvc repro -f retrieve-class-images`"
        )
    if settings.class_captions == "prompt":
        captions = [concept.class_prompt] * len(names)
    return [Example(folder / name, caption) for name, caption in zip(names, captions, strict=True)]
