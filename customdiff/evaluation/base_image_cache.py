"""Cache of base-model images: they are the same after every training, and half of an evaluation's work.

The images are not a DVC output. They lie in a folder whose name is a hash of everything that determines them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters.adapter import fingerprint
from customdiff.config import Base, Evaluate
from customdiff.files import atomic_directory, model_hashes, project_home, source_hash
from customdiff.images import open_rgb, save_all

SETS = 6  # kept: two of `evaluate`, and of sweeps and comparisons with other prompts or numbers of images


def cache_folder() -> Path:
    """The project's cache, which its queued experiments share."""
    return project_home() / ".base-images"


def base_images(
    cache: Path | None,
    pipe: DiffusionPipeline,
    base: Base,
    settings: Evaluate,
    texts: Sequence[str],
    seeds: Sequence[int],
    generate: Callable[[], list[Image.Image]],
) -> list[Image.Image]:
    """The base model's images: from the cache where it has exactly these, or else generated and cached.

    Args:
        cache: folder with the images of the last `SETS` evaluations, one folder each; None: no cache.
        pipe: the base model without an adapter.
        texts, seeds: one per image.
        generate: generates all images, RGB.
    """
    if cache is None:
        return generate()
    cached = cache / _key(pipe, base, settings, texts, seeds)
    if cached.is_dir():
        os.utime(cached)  # most recently used
        return [open_rgb(cached / f"{number:05d}.png") for number in range(len(texts))]
    images = generate()
    with atomic_directory(cached) as incoming:
        save_all({incoming / f"{number:05d}.png": image for number, image in enumerate(images)})
    with suppress(FileNotFoundError):  # another experiment removes old sets as well
        for old in sorted(cache.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-SETS]:
            shutil.rmtree(old, ignore_errors=True)
    return images


def _key(pipe: DiffusionPipeline, base: Base, settings: Evaluate, texts: Sequence[str], seeds: Sequence[int]) -> str:
    """A hash of the weights, the requested images, the sampler, and the code and libraries that compute them."""
    identity = {
        "base": base.model_dump(exclude={"device"}) | {"files": model_hashes(base.model)},
        "fingerprint": fingerprint(pipe),  # the weights behind a Hub name can change
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "evaluate": settings.model_dump(include={"batch_size", "steps", "guidance_scale", "eta", "precision"}),
        "images": list(zip(texts, seeds, strict=True)),
        "computed by": [torch.__version__, diffusers.__version__, str(pipe.device), source_hash("models")],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
