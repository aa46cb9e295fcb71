"""From images to prepared sets: captions, views of each image, and their VAE moments, all drawn from `base.seed`."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm.auto import tqdm

from customdiff.config import Concept, Params, Prepare
from customdiff.errors import UserError
from customdiff.preparation import augmentation, prepared_set
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.sources.instance_images import instance_paths


@dataclass(frozen=True)
class Example:
    """An image file and its caption."""

    path: Path
    caption: str


def instance_examples(folder: Path, concept: Concept, prepare: Prepare, device: torch.device) -> list[Example]:
    """The instance images in `folder` (data/instances/<concept>) with captions that hold the modifier token.

    Raises:
        UserError: there are none, or `captions: sidecar` lacks a file.
    """
    paths = instance_paths(folder)
    if prepare.captions == "sidecar":
        return [Example(path, _sidecar(path, concept)) for path in paths]
    if prepare.captions == "blip":
        described = describe(paths, prepare.captioner, device)
        return [Example(path, with_token(text, concept)) for path, text in zip(paths, described, strict=True)]
    return [Example(path, concept.caption) for path in paths]


def class_examples(folder: Path, concept: Concept, prepare: Prepare) -> list[Example]:
    """The class images in `folder` (data/classes/<concept>, the reference's layout) with their captions."""
    names = (folder / "images.txt").read_text(encoding="utf-8").splitlines()
    captions = (folder / "caption.txt").read_text(encoding="utf-8").splitlines()
    if len(names) != len(captions):
        raise UserError(
            f"{folder}: images.txt has {len(names)} lines and caption.txt {len(captions)}; retrieve them again"
        )
    if prepare.class_captions == "prompt":
        captions = [concept.class_prompt] * len(names)
    return [Example(folder / name, caption) for name, caption in zip(names, captions, strict=True)]


def with_token(description: str, concept: Concept) -> str:
    """A captioner's description with the modifier token before the class, where it names the class; else after ours.

    `a cat on a sofa` becomes `a <new1> cat on a sofa`; `an animal` becomes `photo of a <new1> cat, an animal`.
    """
    words = description.split()
    wanted = concept.class_prompt.split()
    for at in range(len(words) - len(wanted) + 1):
        if [word.lower().strip(",.") for word in words[at : at + len(wanted)]] == [word.lower() for word in wanted]:
            return " ".join([*words[:at], concept.modifier_token, *words[at:]])
    return f"{concept.caption}, {description}"


def describe(paths: list[Path], captioner: str, device: torch.device) -> list[str]:
    """Captions by a BLIP model, a folder or a Hub repository.

    Raises:
        UserError: the model cannot be loaded.
    """
    from transformers import AutoProcessor, BlipForConditionalGeneration

    try:
        processor = AutoProcessor.from_pretrained(captioner)
        model = BlipForConditionalGeneration.from_pretrained(captioner, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"prepare.captioner: {captioner} cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
    captions = []
    for path in tqdm(paths, desc="captions", unit="image"):
        with Image.open(path) as image, torch.inference_mode():
            inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(device)
            ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        captions.append(processor.decode(ids[0], skip_special_tokens=True).strip())
    return captions


def prepare_instances(examples: list[Example], params: Params, vae: AutoencoderKL, seed: list[int]) -> PreparedSet:
    """`prepare.views` views of each instance image, resized as the paper does unless `prepare.augmentation` is off."""
    draw = augmentation.resized_view if params.prepare.augmentation else augmentation.plain_view
    return _prepare(examples, params.prepare, params.prepare.views, draw, vae, seed, "instance views")


def prepare_classes(examples: list[Example], params: Params, vae: AutoencoderKL, seed: list[int]) -> PreparedSet:
    """`prepare.class_views` plain views of each class image."""
    return _prepare(
        examples, params.prepare, params.prepare.class_views, augmentation.plain_view, vae, seed, "class views"
    )


def seed_of(params: Params, concept: str, kind: str) -> list[int]:
    """Seed of a concept's draws: adding a concept changes no other's."""
    return [params.base.seed, zlib.crc32(f"{concept}/{kind}".encode())]


def _prepare(
    examples, prepare: Prepare, count: int, draw, vae: AutoencoderKL, seed: list[int], what: str
) -> PreparedSet:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if prepare.resolution % factor or prepare.resolution // factor < 4:
        raise UserError(
            f"prepare.resolution: {prepare.resolution} px does not suit the model's VAE; use a multiple of {factor}"
        )
    drawn = _views(examples, prepare, count, draw, factor, seed)
    moments, masks, framing, captions = [], [], [], []
    bar = tqdm(total=len(examples) * count, desc=what, unit="view")
    for batch in _batches(drawn, prepare.batch_size):
        pixels = torch.from_numpy(np.stack([view.pixels for view, _ in batch]))
        moments.append(prepared_set.encode(vae, pixels) if prepare.cache_latents else (prepared_set.to_bytes(pixels),))
        masks += [torch.from_numpy(view.mask)[None] for view, _ in batch]
        framing += [view.framing for view, _ in batch]
        captions += [view.prefix + caption for view, caption in batch]
        bar.update(len(batch))
    bar.close()
    names = ("mean", "std") if prepare.cache_latents else ("pixels",)
    tensors = {name: torch.cat(parts) for name, parts in zip(names, zip(*moments, strict=True), strict=True)}
    framing = torch.tensor(framing, dtype=torch.int32)
    return PreparedSet(mask=torch.stack(masks), framing=framing, captions=captions, **tensors)


def _batches(items: Iterator, size: int) -> Iterator[tuple]:
    while batch := tuple(islice(items, size)):
        yield batch


def _views(examples, prepare: Prepare, count: int, draw, factor: int, seed) -> Iterator[tuple[augmentation.View, str]]:
    for index, example in enumerate(examples):
        with Image.open(example.path) as file:
            image = file.convert("RGB")
        for number in range(count):
            rng = np.random.default_rng([*seed, index, number])
            turned = augmentation.flipped(image, rng) if prepare.hflip else image
            yield draw(turned, prepare.resolution, factor, rng, prepare.center_crop), example.caption


def _sidecar(path: Path, concept: Concept) -> str:
    sidecar = path.with_suffix(".txt")
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(
            f"prepare.captions: sidecar, but {path.name} has no caption file; add a .txt beside it in the source"
        ) from error
    caption = caption.replace("{}", concept.modifier_token)
    if concept.modifier_token not in caption:
        raise UserError(
            f"{sidecar}: the caption holds neither {{}} nor {concept.modifier_token}, so it names no subject"
        )
    return caption
