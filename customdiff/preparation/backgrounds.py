"""Views of a photo with the masked subject on another background, and captions that name it.

A background is a color of `COLORS`, or the path of an image whose caption says the place.
"""

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from customdiff import images
from customdiff.config import Concept
from customdiff.config.prepare import Backgrounds
from customdiff.errors import UserError
from customdiff.sources import image_folder

# Middle values of each color; every view's background is a little off them, as a lit wall is
COLORS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "black": (22, 22, 24),
    "grey": (128, 128, 130),
    "red": (204, 40, 44),
    "orange": (240, 138, 36),
    "yellow": (246, 218, 60),
    "green": (56, 150, 66),
    "blue": (48, 96, 200),
    "purple": (128, 62, 168),
    "pink": (244, 164, 196),
    "brown": (116, 74, 42),
}
PREPOSITION = re.compile(
    r"(in|on|at|by|under|above|behind|beside|between|near|inside|outside|among|below|with|against|over|around|along"
    r"|across|before|beneath)\b",
    re.IGNORECASE,
)
SIZES = (0.75, 1.15)  # factors of the subject's size in views on other backgrounds
FEATHER = 1 / 256  # standard deviation of the edge's blur, as a share of the photo's longer side


def names(settings: Backgrounds) -> list[str]:
    """The backgrounds that views are given in turn: colors, then the paths of the images of `settings.images`.

    Raises:
        UserError: the folder has no images, or one has no caption file.
    """
    if settings.images is None:
        return list(settings.colors)
    folder = Path(settings.images)
    found = [folder / name for name in image_folder.walk(folder) if image_folder.is_image(name)]
    if not found:
        raise UserError(f"prepare.backgrounds.images: no images in {folder}")
    for path in found:
        if not image_folder.sidecar_caption(path):
            raise UserError(f"{path}: has no caption; write its place into {path.stem}.txt, such as `in the snow`")
    return [*settings.colors, *map(str, found)]


def name_of_view(settings: Backgrounds, names: list[str], photo: int, view: int, views: int) -> str | None:
    """The background of one of a photo's views; None for the photo's own.

    The first `share` of the views have other backgrounds, in turn, and each photo begins with another one.
    """
    if view >= round(settings.share * views):
        return None
    return names[(photo + view) % len(names)]


def caption_on(name: str, concept: Concept, companion: str = "") -> str:
    """The concept's template caption with a background.

    `photo of a {} cat` becomes `photo of a <new1> cat on a red background`, and `a {} cat, studio light` becomes
    `a <new1> cat on a red background, studio light`. A template that names a background is replaced. An image's
    caption follows the class if it begins with a preposition, else it follows a comma.

    Args:
        companion: words that follow the class, such as ` and a <new2> teapot`.
    """
    caption = concept.caption.rstrip(" .,;")
    if "background" in caption.lower():
        caption = f"photo of a {concept.modifier_token} {concept.class_prompt}"
    before, token, after = caption.partition(concept.modifier_token)
    subject, comma, rest = after.partition(",")
    return f"{before}{token}{subject}{companion}{_place(name)}{comma}{rest}"


def _place(name: str) -> str:
    if name in COLORS:
        return f" on {'an' if name[0] in 'aeiou' else 'a'} {name} background"
    caption = image_folder.sidecar_caption(Path(name)) or ""
    return f" {caption}" if PREPOSITION.match(caption) else f", {caption}"


def feathered(coverage: np.ndarray) -> np.ndarray:
    """A mask (H, W) float32 in [0, 1] with a soft edge."""
    image = Image.fromarray(np.round(coverage * 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(FEATHER * max(image.size)))
    return np.asarray(blurred, np.float32) / 255


def plain_background(color: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A background (H, W, 3) float32 in 0..255: the color, a little off, brighter towards the top or the bottom."""
    base = np.asarray(COLORS[color], np.float32) + rng.normal(0, 5, 3).astype(np.float32) + np.float32(rng.normal(0, 3))
    slope = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None] * np.float32(rng.uniform(-6, 6))
    return np.clip(np.broadcast_to(base + slope, (height, width, 3)), 0, 255)


def picture(name: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A background (H, W, 3) float32 in 0..255; an image is cropped at random to the proportions of the view."""
    if name in COLORS:
        return plain_background(name, height, width, rng)
    image = images.open_rgb(Path(name))
    centering = (float(rng.uniform()), float(rng.uniform()))
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC, centering=centering)
    return np.asarray(fitted, np.float32)


def moved(image: Image.Image, coverage: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """The photo and its mask (H, W) with the subject at another size and place, for a view on another background.

    The size is multiplied by a factor in `SIZES`, and the subject stays inside the photo; a subject that the photo's
    edge cuts stays as it is. Where the mask is 0, the photo that is returned shows nothing.
    """
    height, width = coverage.shape
    rows, columns = np.nonzero(coverage > 0.05)
    margin = round(4 * FEATHER * max(height, width))
    top, bottom = rows.min() - margin, rows.max() + 1 + margin
    left, right = columns.min() - margin, columns.max() + 1 + margin
    if top < 0 or left < 0 or bottom > height or right > width:
        return image, coverage
    scale = min(rng.uniform(*SIZES), height / (bottom - top), width / (right - left))
    size = (max(1, int(scale * (right - left))), max(1, int(scale * (bottom - top))))
    corner = (int(rng.integers(0, width - size[0] + 1)), int(rng.integers(0, height - size[1] + 1)))
    box = (int(left), int(top), int(right), int(bottom))
    pixels, mask = Image.new("RGB", image.size), Image.new("L", image.size)
    share = Image.fromarray(np.round(coverage * 255).astype(np.uint8))
    pixels.paste(image.resize(size, Image.Resampling.BICUBIC, box), corner)
    mask.paste(share.resize(size, Image.Resampling.BICUBIC, box), corner)
    return pixels, np.asarray(mask, np.float32) / 255


def composite(image: Image.Image, coverage: np.ndarray, name: str, rng: np.random.Generator) -> Image.Image:
    """The masked subject of an RGB photo on another background.

    Args:
        coverage: (H, W) float32 in [0, 1]; feathered here.
        name: a color or the path of an image.
    """
    share = feathered(coverage)[..., None]
    background = picture(name, image.height, image.width, rng)
    return Image.fromarray(np.round(share * np.asarray(image, np.float32) + (1 - share) * background).astype(np.uint8))
