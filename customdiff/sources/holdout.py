"""Holdout photos of a concept: their images, and the refusal of photos that are trained on as well."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from customdiff.config import Concept, Download
from customdiff.errors import UserError, printable
from customdiff.images import ImageError, limit_side, open_rgb
from customdiff.sources.image_folder import SourceImage, holdout_paths
from customdiff.sources.instance_images import instance_paths, local_images

SIDE = 32  # px of thumbnails
NEAR = 3.0  # mean difference of thumbnails, of 255, up to which photos are compared by their pixels
NamedImages = Iterable[tuple[str, Image.Image]]


def read_photos(name: str, concept: Concept, limits: Download) -> list[tuple[Path, Image.Image]]:
    """The photos in the folder `concepts.<name>.holdout`, RGB, sized as instance images are.

    Raises:
        UserError: the folder has fewer than two photos, or one cannot be read.
    """
    return [(path, _read(path, limits)) for path in holdout_paths(name, Path(concept.holdout or ""))]


def refuse_shared(name: str, photos: Iterable[tuple[Path, Image.Image]], instances: NamedImages) -> None:
    """Refuse holdout photos whose pixels are those of an instance image.

    Args:
        name: of the concept.
        photos: see `read_photos`.
        instances: name of each file and its image, sized as instance images are.

    Raises:
        UserError: names both files.
    """
    known = {_pixels(image): path for path, image in photos}
    for file, image in instances:
        if path := known.get(_pixels(image)):
            raise UserError(
                f"concepts.{name}.holdout: {path} is also an instance image of {name} ({file}); holdout photos must "
                "not be trained on"
            )


def check_source(name: str, concept: Concept, limits: Download) -> None:
    """Check the holdout photos of a concept before it is downloaded or trained; nothing without `holdout`.

    A source that needs a network is not read; see `check_instances`. Thumbnails are compared first, because decoding
    all photos would take seconds at every `dvc repro`.

    Raises:
        UserError: there are fewer than two photos, one cannot be read, or one is in the source as well.
    """
    if not concept.holdout:
        return
    paths = holdout_paths(name, Path(concept.holdout))
    thumbnails = {path: _thumbnail(path, limits) for path in paths}
    full = cache(partial(_read, limits=limits))
    with tempfile.TemporaryDirectory() as work:
        for item, found in _usable_images(name, concept, limits, Path(work)):
            alike = [path for path in paths if np.abs(thumbnails[path] - found).mean() < NEAR]
            if alike:
                instance = _read(item.data, limits)
                refuse_shared(name, [(path, full(path)) for path in alike], [(printable(item.name), instance)])


def check_instances(name: str, concept: Concept, limits: Download, folder: Path) -> None:
    """Check the holdout photos of a concept against its instance images in `folder`; nothing without `holdout`.

    Raises:
        UserError: see `check_source`.
    """
    if concept.holdout:
        stored = ((str(path), open_rgb(path, max_megapixels=float("inf"))) for path in instance_paths(folder))
        refuse_shared(name, read_photos(name, concept, limits), stored)


def _usable_images(
    name: str, concept: Concept, limits: Download, work: Path
) -> Iterator[tuple[SourceImage, np.ndarray]]:
    """The images of a local source and their thumbnails; what is wrong with the others, `download-data` reports."""
    with suppress(UserError):
        for item in local_images(f"concepts.{name}.source", concept.source, limits, work):
            try:
                thumbnail = _thumbnail(item.data, limits)
            except ImageError:
                continue
            yield item, thumbnail


def _read(source: Path | bytes, limits: Download) -> Image.Image:
    return limit_side(open_rgb(source, limits.max_megapixels), limits.max_side)


def _thumbnail(source: Path | bytes, limits: Download) -> np.ndarray:
    """(SIDE, SIDE, 3), 0 to 255."""
    image = open_rgb(source, limits.max_megapixels, draft=2 * SIDE)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)


def _pixels(image: Image.Image) -> tuple[tuple[int, int], str]:
    return image.size, hashlib.sha256(image.tobytes()).hexdigest()
