"""Preparation of instance and class images: captions, augmented views and VAE moments."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import tqdm

from customdiff.config import Concept, Prepare
from customdiff.errors import UserError
from customdiff.preparation import augmentation, prepared_set
from customdiff.preparation.augmentation import View
from customdiff.preparation.captions import instance_captions
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.sources.instance_images import instance_paths


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


def instance_examples(folder: Path, concept: Concept, settings: Prepare, device: torch.device) -> list[Example]:
    """Instance images in `folder` (data/instances/<concept>), with captions that contain the modifier token.

    Raises:
        UserError: there are no images, or a caption is missing.
    """
    paths = instance_paths(folder)
    captions = instance_captions(paths, concept, settings, device)
    return [Example(path, caption) for path, caption in zip(paths, captions, strict=True)]


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
    moments, masks, framing, captions = [], [], [], []
    bar = tqdm(total=len(examples) * count, desc=what, unit="view")
    for batch in _batches(_views(examples, settings, count, draw, factor, seed), settings.batch_size):
        pixels = torch.from_numpy(np.stack([view.pixels for view, _ in batch]))
        moments.append(prepared_set.encode(vae, pixels) if settings.cache_latents else (prepared_set.to_bytes(pixels),))
        masks += [torch.from_numpy(view.mask)[None] for view, _ in batch]
        framing += [view.framing for view, _ in batch]
        captions += [view.prefix + caption for view, caption in batch]
        bar.update(len(batch))
    bar.close()
    names = ("mean", "std") if settings.cache_latents else ("pixels",)
    tensors = {name: torch.cat(parts) for name, parts in zip(names, zip(*moments, strict=True), strict=True)}
    return PreparedSet(
        mask=torch.stack(masks), framing=torch.tensor(framing, dtype=torch.int32), captions=captions, **tensors
    )


def _batches(items: Iterator, size: int) -> Iterator[tuple]:
    while batch := tuple(islice(items, size)):
        yield batch


def _views(
    examples: list[Example], settings: Prepare, count: int, draw: Callable[..., View], factor: int, seed: list[int]
) -> Iterator[tuple[View, str]]:
    for index, example in enumerate(examples):
        with Image.open(example.path) as file:
            image = file.convert("RGB")
        for number in range(count):
            rng = np.random.default_rng([*seed, index, number])
            oriented = augmentation.flipped(image, rng) if settings.hflip else image
            yield draw(oriented, settings.resolution, factor, rng, settings.center_crop), example.caption
