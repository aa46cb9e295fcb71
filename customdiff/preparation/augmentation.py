"""The paper's augmentation (section 4, implementation details): views of an image at random scales.

A shrunk image is placed on a grey canvas, with a mask that excludes the canvas from the loss; its caption says "very
small" or "far away". An enlarged image is cropped, and its caption says "zoomed in" or "close up".
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

SHRINK_PROBABILITY = 0.66
FAR = ("a far away ", "very small ")
NEAR = ("zoomed in ", "close up ")


@dataclass(frozen=True)
class View:
    """One augmented view of an image.

    Attributes:
        pixels: (3, size, size) float32 in [-1, 1]; the canvas is 0, mid-grey.
        mask: (size // factor, size // factor) bool, True on latent pixels that show the image.
        prefix: words to put before the caption, with a trailing space; may be empty.
        framing: px: height and width of the original image, then top and left of the crop in the scaled image; 0 if
            nothing is cropped. Conditions SDXL (Podell et al. 2023, section 2.2).
    """

    pixels: np.ndarray
    mask: np.ndarray
    prefix: str
    framing: tuple[int, int, int, int]


def resized_view(
    image: Image.Image, size: int, factor: int, rng: np.random.Generator, center_crop: bool = False
) -> View:
    """A view of an instance image at a random scale.

    With probability 0.66 the scale is uniform in [size / 3, size], else in [1.2 size, 1.4 size), as in the paper's and
    the reference's code. Below 0.6 size the prefix is one of `FAR`, above size one of `NEAR`.

    Args:
        image: RGB, any size and aspect ratio.
        size: side of the view, px.
        factor: px per latent pixel, the VAE's scale factor.
        center_crop: crop a non-square image at its center instead of at a random place.
    """
    if rng.uniform() < SHRINK_PROBABILITY:
        scale = int(rng.integers(size // 3, size + 1))
    else:
        scale = int(rng.integers(int(1.2 * size), int(1.4 * size)))
    prefix = ""
    if scale < 0.6 * size:
        prefix = str(rng.choice(FAR))
    elif scale > size:
        prefix = str(rng.choice(NEAR))
    return _view(image, scale, size, factor, rng, center_crop, prefix)


def plain_view(image: Image.Image, size: int, factor: int, rng: np.random.Generator, center_crop: bool = False) -> View:
    """A square crop scaled to `size`, valid everywhere, for class images and without augmentation."""
    return _view(image, size, size, factor, rng, center_crop)


def flipped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image, flipped left to right with probability one half."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.uniform() < 0.5 else image


def place(
    image: Image.Image, scale: int, size: int, factor: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Scale a square image to `scale` px; place it randomly on a canvas of `size` px, or crop it randomly to `size` px.

    As in the reference, the mask of a shrunk image excludes a border of one latent pixel, which mixes image and canvas.
    Unlike in the reference, an image that fills the canvas is valid up to its edge, because there is nothing to mix.

    Returns:
        Pixels (3, size, size) float32 in [-1, 1]; mask (size // factor, size // factor) bool; top and left of the
        crop, px.
    """
    pixels = np.asarray(image.resize((scale, scale), Image.Resampling.BILINEAR), dtype=np.float32) / 127.5 - 1
    top, left = (int(x) for x in rng.integers(0, abs(size - scale) + 1, 2))
    latent = size // factor
    if scale >= size:
        cropped = pixels[top : top + size, left : left + size].transpose(2, 0, 1)
        return np.ascontiguousarray(cropped), np.ones((latent, latent), bool), (top, left)
    canvas = np.zeros((size, size, 3), np.float32)
    canvas[top : top + scale, left : left + scale] = pixels
    mask = np.zeros((latent, latent), bool)
    mask[_inside(top, scale, factor), _inside(left, scale, factor)] = True
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)), mask, (0, 0)


def _view(
    image: Image.Image,
    scale: int,
    size: int,
    factor: int,
    rng: np.random.Generator,
    center_crop: bool,
    prefix: str = "",
) -> View:
    """The largest square crop of the image, at its center or a random place, scaled and placed.

    The reference squashes an instance image to a square instead, which distorts the subject.
    """
    side = min(image.size)
    slack = np.array(image.size) - side
    left, top = slack // 2 if center_crop else [int(rng.integers(0, s + 1)) for s in slack]
    square = image.crop((left, top, left + side, top + side))
    pixels, mask, crop = place(square, scale, size, factor, rng)
    corner = (crop[0] + round(top * scale / side), crop[1] + round(left * scale / side))
    return View(pixels, mask, prefix, (image.height, image.width, *corner))


def _inside(start: int, length: int, factor: int) -> slice:
    """Latent pixels that lie inside [start, start + length) px, without a border of one; at least one pixel."""
    first, end = start // factor + 1, (start + length) // factor - 1
    return slice(first, max(end, first + 1))
