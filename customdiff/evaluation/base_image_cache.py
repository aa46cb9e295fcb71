"""What the base model drew in the last evaluations, kept: it is the same after every training, and half of the drawing.

The pictures lie outside of every DVC output, like checkpoints, in a folder named by a hash of all that shapes them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters.adapter import fingerprint
from customdiff.config import Params
from customdiff.files import project_home
from customdiff.images import open_rgb, save_all
from customdiff.models.base import weight_hashes

SETS = 3  # kept: those of `evaluate`, and of a sweep and a comparison with other prompts or numbers of images


def drawn_folder() -> Path:
    """Where the project keeps them, for its queued experiments too."""
    return project_home() / ".drawn"


def base_images(
    folder: Path | None,
    pipe: DiffusionPipeline,
    params: Params,
    texts: Sequence[str],
    seeds: Sequence[int],
    draw: Callable[[], list[Image.Image]],
) -> list[Image.Image]:
    """The pictures that the base model draws: those in `folder`, where they are of the very same kind, else drawn now.

    Args:
        folder: holds the pictures of the last `SETS` evaluations, in a folder each; None: none are kept.
        pipe: the base model, nothing put into it yet.
        params: the sections `base` and `evaluate`.
        texts, seeds: one a picture.
        draw: draws them all, RGB.
    """
    if folder is None:
        return draw()
    kept = folder / _name(pipe, params, texts, seeds)
    if kept.is_dir():
        os.utime(kept)  # used last
        return [open_rgb(kept / f"{number:05d}.png") for number in range(len(texts))]
    images = draw()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as incoming:
        save_all({Path(incoming) / f"{number:05d}.png": image for number, image in enumerate(images)})
        with suppress(OSError):  # another experiment has kept the same meanwhile
            Path(incoming).rename(kept)
    with suppress(FileNotFoundError):  # another experiment clears up as well
        for old in sorted(folder.glob("[!.]*"), key=lambda path: path.stat().st_mtime)[:-SETS]:
            shutil.rmtree(old, ignore_errors=True)
    return images


def _name(pipe: DiffusionPipeline, params: Params, texts: Sequence[str], seeds: Sequence[int]) -> str:
    """A hash of the model, by its own weights, of what it is asked to draw, and of what it computes with."""
    identity = {
        "base": params.base.model_dump() | {"weights": weight_hashes(params.base)},
        "fingerprint": fingerprint(pipe),  # of a model on the Hub, whose name may come to mean another
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        "evaluate": params.evaluate.model_dump(include={"batch_size", "steps", "guidance_scale", "eta", "precision"}),
        "pictures": list(zip(texts, seeds, strict=True)),
        "computed by": [torch.__version__, diffusers.__version__, str(pipe.device)],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
