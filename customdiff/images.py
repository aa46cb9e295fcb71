"""Safe opening of untrusted images as upright RGB, with limits before decoding, and saving of images.

All images from users' folders, archives and the web are opened by `open_rgb`.
"""

import io
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from customdiff.errors import UserError

JPEG_SIDE = 65_000  # px; the format ends at 65,535, Pillow at 65,500
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_ASPECT = 50
OTHER_SUFFIXES = (".heic", ".heif", ".avif")  # photo formats that are not supported; reported by name


class ImageError(UserError):
    """An image that cannot be used; `name` says which and `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


def open_rgb(
    source: Path | str | bytes, max_megapixels: float = 64, *, name: str | None = None, draft: int | None = None
) -> Image.Image:
    """Decode an image as upright RGB, 8 bits per channel.

    The size in the header is checked before decoding. EXIF rotation is applied, transparency is composited on white,
    16-bit and floating-point greys are scaled to 8 bits, and of an animation the first frame is used.

    Args:
        source: path or bytes of a file in one of `FORMATS`; its suffix does not matter.
        max_megapixels: maximum number of pixels in millions.
        name: name of the image in errors; None: the path.
        draft: px; decode a JPEG several times faster at a half, a quarter or an eighth of its size, with no side below
            this. Other formats keep their size.

    Raises:
        ImageError: the file is not an image, has another format, or is too large, truncated or damaged.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror or error})") from error
    with warnings.catch_warnings(action="ignore"):  # Pillow's warnings are either errors here or harmless
        return _decode(data, max_megapixels, name, draft)


def _decode(data: bytes, max_megapixels: float, name: str, draft: int | None) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"too large: above {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels") from error
    except UnidentifiedImageError as error:
        raise ImageError(name, _what_else(data)) from error
    except Exception as error:  # Pillow's parsers raise many types, such as SyntaxError and struct.error
        raise ImageError(name, f"broken image ({brief(error)})") from error
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise ImageError(
            name,
            f"too large: {image.width} x {image.height} px, above {max_megapixels:g} megapixels",
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ImageError(name, f"too narrow: {image.width} x {image.height} px, above {MAX_ASPECT} to 1")
    try:
        if draft:
            image.draft(None, (draft, draft))
        image.load()
        return _to_rgb(_upright(image))
    except Exception as error:
        raise ImageError(name, f"broken or truncated image ({brief(error)})") from error


def alpha_of(data: bytes) -> Image.Image | None:
    """The upright alpha channel (mode L) of an image that `open_rgb` accepts; None if the image is opaque."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if not image.has_transparency_data or image.mode.startswith("I"):
            return None
        alpha = _upright(image).convert("RGBA").getchannel("A")
    return alpha if np.asarray(alpha).min() < 255 else None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # invalid EXIF does not affect the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode and color profile to sRGB, without metadata."""
    image = _in_srgb(image)
    if image.mode.startswith("I") or image.mode == "F":
        rgb = Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    clean = Image.new("RGB", rgb.size)  # drops EXIF, comments and color profile
    clean.paste(rgb)
    return clean


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert colors from an embedded profile, such as the Display P3 of phones, to sRGB."""
    data = image.info.get("icc_profile")
    if not data or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if ImageCms.getProfileDescription(profile).startswith("sRGB"):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):  # a damaged profile, or one of another mode: colors as they are
        return image


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Greys of more than 8 bits as uint8: 16-bit integers divided by 257, floats in [0, 1] multiplied by 255."""
    top = float(values.max(initial=0))
    whole = values.dtype.kind in "iu" or top > 255
    white = max(top, 65535) if whole else 255 if top > 1 else 1
    return np.clip(np.round(values.astype(np.float64) * (255 / white)), 0, 255).astype(np.uint8)


def _what_else(data: bytes) -> str:
    """Reason for rejecting bytes that no allowed decoder can read."""
    if not data:
        return "empty file"
    if data[4:8] == b"ftyp":
        return "HEIC, HEIF, AVIF or a video cannot be read; export it as JPEG or PNG"
    if data.lstrip()[:1] == b"<":
        return "not an image but a web page, XML or SVG"
    return f"not an image, or of another format than {', '.join(FORMATS)}"


def brief(error: Exception) -> str:
    """Message of an error on one line, shortened."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def limit_side(image: Image.Image, max_side: int) -> Image.Image:
    """Scale an image down proportionally to a maximum side of `max_side` px; smaller images stay unchanged."""
    if max(image.size) <= max_side:
        return image
    return ImageOps.contain(image, (max_side, max_side), Image.Resampling.LANCZOS)


def save_sheet(sheet: Image.Image, target: Path | IO[bytes]) -> None:
    """Write a contact sheet as JPEG, scaled down if it is longer than the format allows."""
    limit_side(sheet, JPEG_SIDE).save(target, "JPEG", quality=90)


def save(image: Image.Image, stem: Path, *, source: bytes = b"") -> Path:
    """Write an RGB image as JPEG if its source is one, else as PNG; returns the path.

    Args:
        stem: path without suffix.
        source: bytes that the image was decoded from; keeping JPEG keeps files of photos small.
    """
    if source.startswith(b"\xff\xd8\xff"):
        path = stem.with_name(f"{stem.name}.jpg")
        image.save(path, quality=95, subsampling=0)
    else:
        path = stem.with_name(f"{stem.name}.png")
        image.save(path, compress_level=4)
    return path


def save_all(images: Mapping[Path, Image.Image]) -> None:
    """Write images to their paths in parallel, and create folders."""
    for folder in {path.parent for path in images}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it compresses
        list(pool.map(lambda item: item[1].save(item[0]), images.items()))
