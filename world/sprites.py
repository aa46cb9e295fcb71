"""Cut the sprites: one transparent picture per subject, style and individual, at most 192 pixels wide or high.

Pack on disk: `sprites/<subject>/<style>-<individual>.png`; the concepts' sprites, larger, lie in `concepts/`.
"""

import argparse
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from world.catalogue import CLIPART, CONCEPTS, DRAWINGS, SUBJECTS

SIDE = 192
CONCEPT_SIDE = 320
NOTO_SIZE = 109  # the only size that the bitmap font holds


def trimmed(picture: Image.Image, side: int, upscale: bool = False) -> Image.Image:
    """RGBA, cut to what is not transparent, then scaled so that its longer side is `side`.

    Args:
        upscale: also where the picture is smaller; otherwise it then stays as it is.
    """
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise ValueError("the picture is wholly transparent")
    picture = picture.crop(box)
    scale = side / max(picture.size)
    if not upscale:
        scale = min(1, scale)
    size = tuple(max(1, round(scale * s)) for s in picture.size)
    # premultiplied, so that the colour of transparent pixels does not bleed into the edges
    return picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def turned(picture: Image.Image, degrees: float) -> Image.Image:
    """The picture with its hue turned: another individual of the same shape."""
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    shift = round(degrees / 360 * 255)
    hue = hue.point(lambda h: (h + shift) % 256)
    other = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    other.putalpha(picture.getchannel("A"))
    return other


TONES = {"white": (0.1, 0.2, 0.8), "grey": (0.0, 0.8, 0.05), "dark": (0.5, 0.35, 0.0)}


def toned(picture: Image.Image, tone: str) -> Image.Image:
    """The picture in white, grey or dark, its shades kept: another individual of the same shape.

    Args:
        tone: names in `TONES` what the saturation is multiplied by, and the value multiplied by and raised by.
    """
    saturation_by, value_by, value_from = TONES[tone]
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    saturation = saturation.point(lambda s: round(s * saturation_by))
    value = value.point(lambda v: round(v * value_by + 255 * value_from))
    other = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    other.putalpha(picture.getchannel("A"))
    return other


def fluent(sources: Path, code: str) -> Image.Image:
    """A code point as Fluent's 3D render, 256 x 256."""
    folder = sources / "fluent/package/assets"
    for name in (f"{code}.webp", f"{code}-fe0f.webp", f"{code.zfill(4)}-fe0f.webp"):
        if (folder / name).exists():
            return Image.open(folder / name).convert("RGBA")
    raise FileNotFoundError(f"{folder}: no picture of {code}")


def noto(sources: Path, code: str) -> Image.Image:
    """A code point as Noto's emoji, 136 x 128."""
    path = sources / "noto/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    canvas = Image.new("RGBA", (136, 128), (0, 0, 0, 0))
    font = ImageFont.truetype(str(path), NOTO_SIZE)
    ImageDraw.Draw(canvas).text((0, 0), chr(int(code, 16)), font=font, embedded_color=True)
    return canvas


def individuals(sources: Path, subject: str) -> dict[str, Image.Image]:
    """Every picture of a subject, keyed "<style>-<individual>"."""
    pictures: dict[str, Image.Image] = {}
    for entry in SUBJECTS[subject].split():
        code, _, degrees = entry.partition("@")
        for style, draw in (("3d render", fluent), ("emoji", noto)):
            picture = draw(sources, code)
            pictures[f"{style}-{entry}"] = turned(picture, float(degrees)) if degrees else picture
    for path in DRAWINGS.get(subject, ()):
        pictures[f"drawing-{Path(path).stem}"] = Image.open(sources / CLIPART / path).convert("RGBA")
    return pictures


def contact_sheet(pack: Path, cell: int = 48, columns: int = 24) -> Image.Image:
    """Every sprite of the pack on grey, for looking at."""
    paths = sorted(pack.glob("*/*.png"))
    sheet = Image.new("RGB", (columns * cell, -(-len(paths) // columns) * cell), (170, 170, 170))
    for i, path in enumerate(paths):
        sprite = Image.open(path)
        sprite.thumbnail((cell, cell))
        sheet.paste(sprite, (i % columns * cell, i // columns * cell), sprite)
    return sheet


def main() -> None:
    """Cut every sprite of the catalogue, and the concepts' apart from them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    work = parser.parse_args().work
    pack, concepts = work / "sprites", work / "concepts"
    shutil.rmtree(pack, ignore_errors=True)
    for subject in SUBJECTS:
        (pack / subject).mkdir(parents=True)
        for name, picture in individuals(work / "sources", subject).items():
            trimmed(picture, SIDE).save(pack / subject / f"{name}.png", optimize=True)
    concepts.mkdir(exist_ok=True)
    for name, path in CONCEPTS.items():
        trimmed(Image.open(work / "sources" / path), CONCEPT_SIDE, upscale=True).save(concepts / f"{name}.png")
    contact_sheet(pack).save(work / "sprites.png")
    print(len(list(pack.glob("*/*.png"))), "sprites")


if __name__ == "__main__":
    main()
