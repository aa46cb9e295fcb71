"""Preparation of instance and class images: captions, augmented views and VAE moments."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import tqdm

from customdiff.config import Concept, Prepare
from customdiff.errors import UserError
from customdiff.preparation import augmentation, backgrounds, prepared_set
from customdiff.preparation.augmentation import View
from customdiff.preparation.captions import Caption, instance_captions
from customdiff.preparation.masks import FoundMask, SubjectMask, subject_masks
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.sources.instance_images import instance_paths


@dataclass(frozen=True)
class Example:
    """An image file, its caption, and for an instance image what its views on other backgrounds are made of.

    Attributes:
        mask: the subject's; None where it is not known.
        captions_on: the caption of a view by the background's color; empty where every view keeps its background.
        notes: where caption and mask are from, and what was set aside, for the user.
    """

    path: Path
    caption: str
    mask: SubjectMask | None = None
    captions_on: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""


def instance_examples(
    folder: Path, concept: Concept, settings: Prepare, device: torch.device, all_masks: bool = False
) -> list[Example]:
    """Instance images in `folder` (data/instances/<concept>), with captions that contain the modifier token.

    Args:
        all_masks: find the masks of all photos (the masked loss), not only of those that get other backgrounds.

    Raises:
        UserError: there are no images, a caption is missing, or the segmenter cannot be loaded.
    """
    paths = instance_paths(folder)
    captions = dict(zip(paths, instance_captions(paths, concept, settings, device), strict=True))
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
    notes = [f"caption from {caption.origin}"]
    if mask:
        notes.append(f"mask from {mask.origin} ({mask.coverage.mean():.0%} of the photo)")
        if varied:
            colors = settings.backgrounds.colors
            captions_on = {color: backgrounds.caption_on(color, concept) for color in colors}
            notes.append(f"{settings.backgrounds.share:.0%} of its views on other backgrounds")
        if mask.origin == "alpha" and caption.origin == "template":  # transparent parts were stored as white
            text = backgrounds.caption_on("white", concept)
    elif found:
        notes.append(f"warning: {found.problem}; the photo is used whole")
    else:
        notes.append("no mask")
    return Example(path, text, mask, captions_on, "; ".join(notes))


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


def prepare_instances(examples: list[Example], settings: Prepare, vae: AutoencoderKL, seed: list[int]) -> PreparedSet:
    """`prepare.views` views of each instance image, randomly resized as in the paper if `augmentation` is on."""
    draw = augmentation.resized_view if settings.augmentation else augmentation.plain_view
    return _prepare(examples, settings, settings.views, draw, vae, seed, "instance views")


def prepare_classes(examples: list[Example], settings: Prepare, vae: AutoencoderKL, seed: list[int]) -> PreparedSet:
    """`prepare.class_views` square crops of each class image."""
    return _prepare(examples, settings, settings.class_views, augmentation.plain_view, vae, seed, "class views")


def seed_of(seed: int, concept: str, kind: str) -> list[int]:
    """Seed for the views of one concept, independent of the other concepts.

    Args:
        seed: `base.seed`.
        kind: instance or class.
    """
    return [seed, zlib.crc32(f"{concept}/{kind}".encode())]


def _prepare(
    examples: list[Example],
    settings: Prepare,
    count: int,
    draw: Callable[..., View],
    vae: AutoencoderKL,
    seed: list[int],
    what: str,
) -> PreparedSet:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if settings.resolution % factor or settings.resolution // factor < 4:
        raise UserError(
            f"prepare.resolution: {settings.resolution} px does not fit the VAE; use a multiple of {factor}, "
            f"at least {4 * factor}"
        )
    moments, masks, subjects, framing, captions = [], [], [], [], []
    bar = tqdm(total=len(examples) * count, desc=what, unit="view")
    for batch in _batches(_views(examples, settings, count, draw, factor, seed), settings.batch_size):
        pixels = torch.from_numpy(np.stack([view.pixels for view, _, _ in batch]))
        moments.append(prepared_set.encode(vae, pixels) if settings.cache_latents else (prepared_set.to_bytes(pixels),))
        masks += [torch.from_numpy(view.mask)[None] for view, _, _ in batch]
        subjects += [torch.from_numpy(subject)[None] for _, _, subject in batch]
        framing += [view.framing for view, _, _ in batch]
        captions += [view.prefix + caption for view, caption, _ in batch]
        bar.update(len(batch))
    bar.close()
    names = ("mean", "std") if settings.cache_latents else ("pixels",)
    tensors = {name: torch.cat(parts) for name, parts in zip(names, zip(*moments, strict=True), strict=True)}
    if any(example.mask for example in examples):
        tensors["subject"] = torch.stack(subjects).contiguous()
    return PreparedSet(
        mask=torch.stack(masks), framing=torch.tensor(framing, dtype=torch.int32), captions=captions, **tensors
    )


def _batches(items: Iterator, size: int) -> Iterator[tuple]:
    while batch := tuple(islice(items, size)):
        yield batch


def _views(
    examples: list[Example], settings: Prepare, count: int, draw: Callable[..., View], factor: int, seed: list[int]
) -> Iterator[tuple[View, str, np.ndarray]]:
    """Views with their captions (without prefix) and the subject's share of each latent pixel, (h, w) float32."""
    for index, example in enumerate(examples):
        with Image.open(example.path) as file:
            image = file.convert("RGB")
        for number in range(count):
            shown, caption, mask = image, example.caption, example.mask
            color = backgrounds.color_of_view(settings.backgrounds, index, number, count)
            if mask and color and color in example.captions_on:
                rng = np.random.default_rng([*seed, index, number, 1])  # apart from the augmentation's draws
                if settings.backgrounds.vary_place:
                    shown, coverage = backgrounds.moved(image, mask.coverage, rng)
                    mask = replace(mask, coverage=coverage)
                shown, caption = backgrounds.composite(shown, mask.coverage, color, rng), example.captions_on[color]
            view = _draw(shown, settings, draw, factor, [*seed, index, number])
            yield view, caption, _subject_of(mask, view, settings, draw, factor, [*seed, index, number])


def _draw(image: Image.Image, settings: Prepare, draw: Callable[..., View], factor: int, seed: list[int]) -> View:
    rng = np.random.default_rng(seed)
    turned = augmentation.flipped(image, rng) if settings.hflip else image
    return draw(turned, settings.resolution, factor, rng, settings.center_crop)


def _subject_of(
    mask: SubjectMask | None, view: View, settings: Prepare, draw: Callable[..., View], factor: int, seed: list[int]
) -> np.ndarray:
    """The subject's share of each latent pixel of a view; 1 everywhere where no mask is known."""
    if mask is None:
        return np.ones(view.mask.shape, np.float32)
    coverage = Image.fromarray(np.round(mask.coverage * 255).astype(np.uint8)).convert("RGB")
    drawn = _draw(coverage, settings, draw, factor, seed)  # the same draws as the view's
    share = (drawn.pixels[0] + 1) / 2
    height, width = view.mask.shape
    return share.reshape(height, factor, width, factor).mean((1, 3)) * view.mask
