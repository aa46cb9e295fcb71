"""Preparation of instance and class images: views and their VAE moments."""

import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from customdiff.config import Params, Prepare
from customdiff.errors import UserError
from customdiff.files import atomic_directory
from customdiff.images import save_sheet
from customdiff.models import base
from customdiff.preparation import augmentation, prepared_set, sheet
from customdiff.preparation.examples import Example, class_examples, instance_examples
from customdiff.preparation.latent_cache import LatentCache
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.preparation.together import Company
from customdiff.preparation.views import Views
from customdiff.sources.instance_images import errors_name_the_source


def prepare_concept(
    params: Params,
    name: str,
    *,
    instances: Path,
    classes: Path,
    out: Path,
    cache: Path | None = None,
    others: Mapping[str, Path] | None = None,
) -> tuple[list[Example], dict[str, PreparedSet]]:
    """Prepare a concept's instance images, and its class images if they are used.

    Writes `out`/instance, `out`/class and `out`/sheet.jpg.

    Args:
        instances, classes: folders of its instance and class images.
        cache: folder of VAE moments of earlier runs; None: encode everything.
        others: folders of the instance images of other concepts, for `prepare.together`.

    Returns:
        The instance images, and the prepared sets by kind.

    Raises:
        UserError: a caption is wrong or missing, a model cannot be loaded, or `prepare.resolution` does not fit.
    """
    settings, concept = params.prepare, params.concepts[name]
    device = base.device(params.base.device)
    vae = base.load_part(params.base, "vae", AutoencoderKL, device=device).to(memory_format=torch.channels_last)
    company = Company.of(params, name, others or {}, device)
    tokenizer, all_masks = base.load_tokenizer(params.base), params.train.mask_weight != 1 or company is not None
    with errors_name_the_source(instances, f"concepts.{name}.source: "):
        examples = instance_examples(instances, concept, settings, device, tokenizer=tokenizer, all_masks=all_masks)
    latents = LatentCache(cache, vae) if cache else None
    seeds = {kind: seed_of(params.base.seed, name, kind) for kind in ("instance", "class")}
    with atomic_directory(out) as folder:
        sets = {"instance": prepare_instances(examples, settings, vae, seeds["instance"], latents, company)}
        if params.train.preserves_prior:
            found = class_examples(classes, concept, settings)
            sets["class"] = prepare_classes(found, settings, vae, seeds["class"], latents)
        save_sheet(sheet.contact_sheet(examples, company), folder / "sheet.jpg")
        for kind, prepared in sets.items():
            prepared_set.save(prepared, folder / kind)
    if latents:
        latents.prune()
    return examples, sets


def prepare_instances(
    examples: list[Example],
    settings: Prepare,
    vae: AutoencoderKL,
    seed: list[int],
    cache: LatentCache | None = None,
    company: Company | None = None,
) -> PreparedSet:
    """`prepare.views` views of each instance image, randomly resized as in the paper if `augmentation` is on.

    Args:
        seed: of the views; see `seed_of`.
        cache: VAE moments of earlier runs; None: encode everything.
        company: other concepts that `prepare.together` further views of each image show its subject beside.

    Raises:
        UserError: `prepare.resolution` does not fit the VAE.
    """
    draw = augmentation.resized_view if settings.augmentation else augmentation.plain_view
    views = Views(examples, settings, settings.views, draw, _downsampling(settings, vae), seed, company)
    return _prepare(views, vae, cache, "instance views")


def prepare_classes(
    examples: list[Example], settings: Prepare, vae: AutoencoderKL, seed: list[int], cache: LatentCache | None = None
) -> PreparedSet:
    """`prepare.class_views` square crops of each class image; otherwise as `prepare_instances`."""
    draw = augmentation.plain_view
    views = Views(examples, settings, settings.class_views, draw, _downsampling(settings, vae), seed)
    return _prepare(views, vae, cache, "class views")


def seed_of(seed: int, concept: str, kind: str) -> list[int]:
    """Seed for the views of one concept, independent of the other concepts.

    Args:
        seed: `base.seed`.
        kind: instance or class.
    """
    return [seed, zlib.crc32(f"{concept}/{kind}".encode())]


def _downsampling(settings: Prepare, vae: AutoencoderKL) -> int:
    """Pixels per latent pixel, which must divide the resolution."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if settings.resolution % factor or settings.resolution // factor < 4:
        raise UserError(
            f"prepare.resolution: {settings.resolution} px does not fit the VAE; use a multiple of {factor}, "
            f"at least {4 * factor}"
        )
    return factor


def _prepare(views: Views, vae: AutoencoderKL, cache: LatentCache | None, progress: str) -> PreparedSet:
    settings = views.settings
    encoded, masks, subjects, framing, captions = [], [], [], [], []
    with tqdm(total=len(views), desc=progress, unit="view") as bar:
        for batch in _batches(iter(views), settings.batch_size):
            pixels = np.stack([view.pixels for view, _, _ in batch])
            encoded.append(_encode(pixels, vae, cache) if settings.cache_latents else _stored(pixels))
            masks += [torch.from_numpy(view.mask)[None] for view, _, _ in batch]
            subjects += [torch.from_numpy(subject)[None] for _, _, subject in batch]
            framing += [view.framing for view, _, _ in batch]
            captions += [view.prefix + caption for view, caption, _ in batch]
            bar.update(len(batch))
    tensors = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    if any(example.mask for example in views.examples):
        tensors["subject"] = torch.stack(subjects).contiguous()
    return PreparedSet(
        mask=torch.stack(masks), framing=torch.tensor(framing, dtype=torch.int32), captions=captions, **tensors
    )


def _encode(pixels: np.ndarray, vae: AutoencoderKL, cache: LatentCache | None) -> dict[str, Tensor]:
    mean, std = cache.encode(pixels) if cache else prepared_set.encode(vae, torch.from_numpy(pixels))
    return {"mean": mean, "std": std}


def _stored(pixels: np.ndarray) -> dict[str, Tensor]:
    return {"pixels": prepared_set.to_bytes(torch.from_numpy(pixels))}


def _batches(items: Iterator, size: int) -> Iterator[tuple]:
    while batch := tuple(islice(items, size)):
        yield batch
