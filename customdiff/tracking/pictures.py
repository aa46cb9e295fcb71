"""Pictures for the descriptions of runs, where MLflow's pages show them without parameters around them."""

import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH = 960  # px, what fits beside the menu on a laptop
CELL, GAP, HEAD = 128, 6, 24  # px


def preview(path: Path, out: Path) -> Path:
    """Write an image that is at most `WIDTH` px wide; returns `out`."""
    with Image.open(path) as image:
        image.thumbnail((WIDTH, image.height))
        image.convert("RGB").save(out, quality=85)
    return out


def validation_sheet(folder: Path, out: Path) -> Path | None:
    """Write the validation images of a training: one row per image, one column per step.

    Args:
        folder: of images named `step000125-prompt0-1.png`.

    Returns:
        `out`; None if there are no images.
    """
    named = [(path, re.fullmatch(r"step(\d+)-(prompt\d+-\d+)", path.stem)) for path in sorted(folder.glob("*.png"))]
    images = {(found[2], int(found[1])): path for path, found in named if found}
    if not images:
        return None
    rows, steps = sorted({name for name, _ in images}), sorted({step for _, step in images})
    size = (len(steps) * (CELL + GAP), HEAD + len(rows) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, step in enumerate(steps):
        title = f"step {step}" if step else "base model"
        draw.text((column * (CELL + GAP), 4), title, "black", font)
        for row, name in enumerate(rows):
            if (name, step) in images:
                with Image.open(images[name, step]) as image:
                    cell = image.convert("RGB").resize((CELL, CELL))
                sheet.paste(cell, (column * (CELL + GAP), HEAD + row * (CELL + GAP)))
    sheet.thumbnail((WIDTH, sheet.height))
    sheet.save(out, quality=90)
    return out
