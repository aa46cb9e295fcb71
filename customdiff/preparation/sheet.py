"""Contact sheet of a concept's photos: each with the outline of its mask, a view on another background, its caption.

With several concepts also a view beside another one.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from customdiff.preparation import backgrounds
from customdiff.preparation.together import Company, cut_out

if TYPE_CHECKING:
    from customdiff.preparation.examples import Example

SIDE, GAP, TEXT_WIDTH, LINE = 160, 8, 380, 16
OUTLINE = (255, 0, 90)


def contact_sheet(examples: Sequence["Example"], company: Company | None = None) -> Image.Image:
    """One row per photo, RGB; `company`: other concepts that the photo's subject is shown beside."""
    columns = 3 if company else 2
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + TEXT_WIDTH, len(examples) * (SIDE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, example in enumerate(examples):
        top = GAP + row * (SIDE + GAP)
        with Image.open(example.path) as file:
            photo = file.convert("RGB")
        shown = [photo]
        if example.mask:
            shown = [outlined(photo, example.mask.coverage)]
            names = list(example.captions_on) or list(backgrounds.COLORS)
            name, rng = names[row % len(names)], np.random.default_rng(row)
            if example.captions_on:
                shown.append(backgrounds.composite(photo, example.mask.coverage, name, rng))
            if company and (cutout := cut_out(example.path, example.mask)):
                shown.append(company.beside(cutout, name, min(photo.size), rng)[0])
        for column, image in enumerate(shown):
            image.thumbnail((SIDE, SIDE))
            sheet.paste(image, (GAP + column * (SIDE + GAP), top))
        lines = [part for text in (example.caption, *example.notes) for part in textwrap.wrap(text, 52)]
        for number, line in enumerate(lines[: SIDE // LINE]):
            draw.text((columns * (SIDE + GAP) + GAP, top + number * LINE), line, "black", font)
    return sheet


def outlined(photo: Image.Image, coverage: np.ndarray) -> Image.Image:
    """An RGB photo with the edge of its mask (H, W) drawn on it, as wide as a hundredth of the photo."""
    subject = coverage > 0.5
    edge = np.zeros_like(subject)
    reach = max(1, round(max(subject.shape) / 100))
    for axis in (0, 1):
        edge |= subject & ~np.roll(subject, reach, axis) | subject & ~np.roll(subject, -reach, axis)
    pixels = np.asarray(photo).copy()
    pixels[edge] = OUTLINE
    return Image.fromarray(pixels)
