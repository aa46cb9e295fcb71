"""Images in a folder, with their caption files, in natural order."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from customdiff import images
from customdiff.errors import UNPRINTABLE, UserError, printable

MAX_CAPTION_BYTES = 64 * 1024
IMAGE_SUFFIXES = images.SUFFIXES + images.OTHER_SUFFIXES
MASK_SUFFIX = ".mask.png"
MIN_HOLDOUT = 2  # photos


@dataclass(frozen=True)
class SourceImage:
    """One undecoded image: its name in the source, its bytes, its caption, and its subject mask."""

    name: str
    data: bytes
    caption: str | None = None
    problem: str | None = None  # why the bytes could not be read
    mask: bytes | None = None  # of the mask file


@dataclass(frozen=True)
class Refused:
    """An image that was skipped, and why."""

    name: str
    reason: str


def decode(item: SourceImage, max_megapixels: float) -> Image.Image:
    """Decode an image as upright RGB, 8 bits per channel; see `images.open_rgb`.

    Raises:
        ImageError: it could not be read, is too large, or is not an image of a supported format.
    """
    if item.problem:
        raise images.ImageError(item.name, item.problem)
    return images.open_rgb(item.data, max_megapixels, name=item.name)


def natural(name: str) -> list[Any]:
    """Sort key that puts `img2` before `img10`; ignores case, which only breaks ties."""
    pieces = re.split(r"([0-9]+)", name.lower())
    # A number by its digits, because names in archives may have more of them than `int` accepts.
    digits = [piece.lstrip("0") for piece in pieces]
    parts = [
        (1, len(number), number) if piece.isdecimal() else (0, 0, piece)
        for piece, number in zip(pieces, digits, strict=True)
    ]
    return [parts, name]


def is_image(name: str) -> bool:
    """Whether a name has an image suffix, including formats that `decode` refuses; masks are not images."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_mask(name)


def is_mask(name: str) -> bool:
    """Whether a name is that of a subject mask: `<photo>.mask.png`, with or without the photo's own suffix."""
    return name.lower().endswith(MASK_SUFFIX)


def walk(folder: Path) -> list[str]:
    """Files below a folder as relative POSIX names in natural order, without hidden ones and `__MACOSX`."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in names if not is_hidden(name)]
    return sorted(found, key=natural)


def holdout_paths(concept: str, folder: Path) -> list[Path]:
    """The photos in the folder `concepts.<concept>.holdout`, in natural order.

    Raises:
        UserError: there are fewer than `MIN_HOLDOUT`.
    """
    names = walk(folder) if folder.is_dir() else []
    paths = [folder / name for name in names if is_image(name)]
    if len(paths) < MIN_HOLDOUT:
        raise UserError(
            f"concepts.{concept}.holdout: {folder} has {len(paths)} photos; keep at least {MIN_HOLDOUT} out of "
            "training, or remove the key"
        )
    return paths


def is_hidden(part: str) -> bool:
    """Whether one part of a path is hidden, or the folder that macOS adds to archives."""
    return part.startswith(".") or part == "__MACOSX"


def folder_images(folder: Path, names: Iterable[str], max_megabytes: float) -> Iterator[SourceImage]:
    """Read the named images of a folder one by one, each with its caption (`.txt`) and subject mask (`.mask.png`)."""
    for raw in names:
        path, name = folder / raw, printable(raw)
        try:
            status = path.stat()
            megabytes = status.st_size / 1e6
            if not stat.S_ISREG(status.st_mode):
                yield SourceImage(name, b"", problem="not a file, but a folder, a pipe or a device")
            elif megabytes > max_megabytes:
                yield SourceImage(name, b"", problem=f"file of {megabytes:.0f} MB, above {max_megabytes:g} MB")
            else:
                yield SourceImage(name, path.read_bytes(), sidecar_caption(path), mask=mask_beside(path, max_megabytes))
        except OSError as error:
            yield SourceImage(name, b"", problem=f"cannot be read ({error.strerror or error})")


def sidecar_caption(image: Path) -> str | None:
    """The caption in the `.txt` file beside an image, on one line; None if there is no such file."""
    for suffix in (".txt", ".TXT"):
        path = image.with_suffix(suffix)
        if path.is_file():
            with path.open("rb") as file:
                return one_line(file.read(MAX_CAPTION_BYTES))
    return None


def mask_beside(image: Path, max_megabytes: float) -> bytes | None:
    """The bytes of `a.jpg.mask.png` or `a.mask.png` beside `a.jpg`; None without one, or if it is too large."""
    for path in (image.with_name(image.name + MASK_SUFFIX), image.with_name(image.stem + MASK_SUFFIX)):
        if path.is_file() and path.stat().st_size <= max_megabytes * 1e6:
            return path.read_bytes()
    return None


def one_line(text: str | bytes) -> str | None:
    """A caption on one line, without control characters; None if it is empty. Bytes are read as UTF-8."""
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig", errors="replace")
    return " ".join(UNPRINTABLE.sub(" ", text).split()) or None
