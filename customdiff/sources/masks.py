"""Subject masks that photos bring with them: their alpha channel, or a mask file beside them."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from customdiff import images
from customdiff.sources.image_folder import MASK_SUFFIX, SourceImage

ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class SourceMask:
    """A subject mask (mode L, white on the subject) and where it is from: "alpha" or "file"."""

    image: Image.Image
    origin: str


def mask_of(item: SourceImage, size: tuple[int, int], max_megapixels: float) -> SourceMask | None:
    """The subject mask of an image that was decoded: the file beside it, else its own alpha channel; or None.

    Args:
        size: width and height at which the image is stored; the mask is scaled to it.

    Raises:
        ImageError: the mask file cannot be read, or has other proportions than the image.
    """
    if item.mask is None:
        alpha = images.alpha_of(item.data)
        return SourceMask(_scaled(alpha, size), "alpha") if alpha else None
    name = f"{item.name}: its mask"
    opened = images.open_rgb(item.mask, max_megapixels, name=name)
    mask = images.alpha_of(item.mask) or opened.convert("L")  # a cutout saved as a mask has it in its alpha channel
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > ASPECT_TOLERANCE:
        raise images.ImageError(
            name, f"{mask.width} x {mask.height} px has other proportions than the photo ({size[0]} x {size[1]})"
        )
    return SourceMask(_scaled(mask, size), "file")


def stored_masks(folder: Path) -> dict[str, tuple[Path, str]]:
    """Masks that download-data wrote to `folder` (data/instances/<concept>): path and origin, by the photo's name."""
    try:
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, KeyError):
        entries = []
    origins = {entry["file"]: entry.get("mask_from", "file") for entry in entries}
    found = {}
    for path in sorted(folder.glob(f"*{MASK_SUFFIX}")):
        photo = path.name.removesuffix(MASK_SUFFIX) + ".png"
        found[photo] = (path, origins.get(photo, "file"))
    return found


def _scaled(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    return mask if mask.size == size else mask.resize(size, Image.Resampling.LANCZOS)
