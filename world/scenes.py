"""Compose scenes: sprites on a background, and a caption that says what is there.

A scene is a pure function of (seed, split, index): nothing is stored, any scene can be made again anywhere.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from world.backgrounds import background as draw_background
from world.catalogue import COLOURS, CURRICULUM, TEXTURES, article, background_phrase, plural, singular

SIDE = 64
BACKGROUNDS = (*COLOURS, *TEXTURES)
# Each use has scenes of its own: the judge hears nothing of what the base is trained on, nor is anything graded or
# pooled that either was trained on.
SPLITS = {"base": 0, "judge": 1, "held-out": 2, "pool": 3, "concept": 4}

# size -> longer side of the sprite in pixels, and how far its centre may lie from the middle
SIZES: dict[str, tuple[tuple[int, int], int]] = {
    "very small": ((11, 17), 22),
    "normal": ((28, 54), 10),
    "large": ((42, 54), 3),
    "close up": ((74, 96), 8),
}


@dataclass(frozen=True)
class Distribution:
    """What scenes are drawn from; shares are probabilities."""

    subjects: tuple[str, ...]
    styles: tuple[str, ...] = ("3d render", "emoji", "drawing")
    plain: float = 0.55  # share of plain colours among the backgrounds
    backgrounds: tuple[str, ...] = BACKGROUNDS
    pairs: float = 0.15
    counts: float = 0.10
    very_small: float = 0.12
    close_up: float = 0.12
    normal: str = "normal"  # the size of all others
    spare_held_out: bool = False  # leave the held-out (subject, background) pairs out


@dataclass
class Scene:
    """A picture (64, 64, 3) uint8, its caption, and what the caption says, for grading."""

    image: np.ndarray
    caption: str
    subjects: tuple[str, ...]
    background: str
    size: str
    count: int = 1
    style: str | None = None
    sprites: tuple[str, ...] = field(default=())


def world_distribution(sprites: Sprites) -> Distribution:
    """Everything there is: what the CLIPs and the VAE learn."""
    return Distribution(subjects=tuple(sprites.pictures))


def curriculum_distribution() -> Distribution:
    """The UNet's first phase: one subject in one style, large and near the middle, mostly on plain colours."""
    return Distribution(
        subjects=CURRICULUM,
        styles=("3d render",),
        plain=0.8,
        pairs=0.03,
        counts=0.02,
        very_small=0.04,
        close_up=0.04,
        normal="large",
        spare_held_out=True,
    )


def company_distribution() -> Distribution:
    """The UNet's second phase: the same subjects, often two of them in one picture."""
    return replace(curriculum_distribution(), plain=0.7, pairs=0.4, very_small=0.06, close_up=0.06)


DISTRIBUTIONS = {
    "world": world_distribution,
    "curriculum": lambda sprites: curriculum_distribution(),
    "company": lambda sprites: company_distribution(),
}


def is_held_out(subject: str, background: str) -> bool:
    """True of about one (subject, background) pair in twelve: the UNet is graded on them and never sees them."""
    return zlib.crc32(f"{subject} {background}".encode()) % 12 == 0


@dataclass
class Sprites:
    """The pack in memory: subject -> style -> pictures (premultiplied RGBa), with their names."""

    pictures: dict[str, dict[str, list[tuple[str, Image.Image]]]]

    @classmethod
    def load(cls, pack: Path) -> Sprites:
        """Read `pack/<subject>/<style>-<individual>.png`."""
        pictures: dict[str, dict[str, list[tuple[str, Image.Image]]]] = {}
        for path in sorted(pack.glob("*/*.png")):
            style = path.stem.partition("-")[0]
            styles = pictures.setdefault(path.parent.name, {})
            styles.setdefault(style, []).append((path.stem, Image.open(path).convert("RGBa")))
        if not pictures:
            raise FileNotFoundError(f"{pack} holds no sprites; run `python -m world.sprites` first")
        return cls(pictures)

    def draw(self, rng: np.random.Generator, subject: str, style: str) -> tuple[str, Image.Image]:
        """One individual of a subject in a style."""
        found = self.pictures[subject][style]
        return found[rng.integers(len(found))]


def pasted(canvas: np.ndarray, sprite: Image.Image, longer: float, centre: tuple[float, float]) -> None:
    """Paste a premultiplied sprite into `canvas` (H, W, 3) in place; `longer` and `centre` (x, y) in its pixels."""
    scale = longer / max(sprite.size)
    width, height = (max(2, round(scale * s)) for s in sprite.size)
    if (width, height) != sprite.size:
        sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
    left, top = round(centre[0] - width / 2), round(centre[1] - height / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, canvas.shape[1]), min(top + height, canvas.shape[0])
    # raw bytes, because numpy does not read Pillow's premultiplied mode
    rgba = np.frombuffer(sprite.tobytes(), np.uint8).reshape(height, width, 4).astype(np.float32)
    part = rgba[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - part[..., 3:] / 255) + part[..., :3]


def choice(rng: np.random.Generator, options: tuple | list):
    """One of the options, as it is."""
    return options[rng.integers(len(options))]


def place_phrase(rng: np.random.Generator, background: str) -> str:
    """The caption's words for the background; sometimes none at all."""
    draw = rng.random()
    if draw < 0.12:
        return ""
    if background in COLOURS and draw < 0.35:
        return choice(rng, (f" on {background}", f" with {article(background)} background"))
    return " " + background_phrase(background)


def caption_of(
    rng: np.random.Generator, subjects: tuple[str, ...], count: int, style: str | None, background: str, size: str
) -> str:
    """A caption in one of the wordings; among them those of Custom Diffusion's augmentation."""
    if len(subjects) == 2:
        thing = f"{singular(subjects[0])} {choice(rng, ('next to', 'and'))} {singular(subjects[1])}"
    elif count > 1:
        thing = f"{('two', 'three')[count - 2]} {plural(subjects[0])}"
    else:
        thing = singular(subjects[0])
    kinds = ("photo", "photo", "picture")
    kind = style if style and rng.random() < 0.45 else choice(rng, (None, *kinds))
    place = place_phrase(rng, background)
    if size == "very small":
        if kind is None:
            small = f"a very small {subjects[0]}"
            return choice(rng, (f"{small}{place}", f"{thing} far away{place}"))
        return choice(rng, ("very small ", "a far away ")) + f"{kind} of {thing}{place}"
    if size == "close up":
        if kind is None:
            return choice(rng, ("zoomed in ", "close up ", "a close up of ")) + thing + place
        return choice(rng, ("zoomed in ", "close up ")) + f"{kind} of {thing}{place}"
    if kind is None:
        return thing + place
    return (f"{kind} of " if kind == "photo" and rng.random() < 0.5 else f"{article(kind)} of ") + thing + place


def compose(
    sprites: Sprites,
    of: Distribution,
    split: str,
    index: int,
    seed: int = 0,
    fixed: tuple[str, str] | None = None,
) -> Scene:
    """Scene number `index` of a split; `fixed` asks for one (subject, background), alone and at the normal size."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    subject = choice(rng, of.subjects)
    kind = COLOURS if rng.random() < of.plain else TEXTURES
    allowed = [b for b in of.backgrounds if not (of.spare_held_out and is_held_out(subject, b))]
    background = choice(rng, [b for b in allowed if b in kind] or allowed)
    if fixed:
        subject, background = fixed
    style = choice(rng, [s for s in of.styles if s in sprites.pictures[subject]])

    subjects, count, size = (subject,), 1, of.normal
    draw = rng.random()
    if fixed:
        pass
    elif draw < of.pairs:
        others = [s for s in of.subjects if s != subject and style in sprites.pictures[s]]
        subjects = (subject, choice(rng, others))
        count = 2
    elif draw < of.pairs + of.counts:
        count = int(rng.integers(2, 4))
    else:
        draw = rng.random()
        if draw < of.very_small:
            size = "very small"
        elif draw < of.very_small + of.close_up:
            size = "close up"

    canvas = draw_background(background, rng, SIDE).copy()
    used = []
    if count == 1:
        name, sprite = sprites.draw(rng, subject, style)
        (low, high), spread = SIZES[size]
        centre = SIDE / 2 + rng.uniform(-spread, spread, 2)
        pasted(canvas, sprite, rng.uniform(low, high), tuple(centre))
        used.append(name)
    else:
        slots = ((18, 46) if count == 2 else (13, 32, 51), 26 if count == 2 else 19)
        individual = sprites.draw(rng, subject, style)
        for i, x in enumerate(slots[0]):
            name, sprite = individual if len(subjects) == 1 else sprites.draw(rng, subjects[i], style)
            longer = slots[1] * rng.uniform(0.85, 1.12)
            pasted(canvas, sprite, longer, (x + rng.uniform(-2, 2), SIDE / 2 + rng.uniform(-7, 7)))
            used.append(name)
    image = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    caption = caption_of(rng, subjects, count, style, background, size)
    return Scene(image, caption, subjects, background, size, count, style, tuple(used))


def to_tensor(images: list[np.ndarray]):
    """uint8 pictures (H, W, 3) to a float tensor (N, 3, H, W) in -1..1, the range of the VAE."""
    import torch

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def contact_sheet(images: list[np.ndarray], columns: int = 8, scale: int = 2) -> Image.Image:
    """Pictures of one size, side by side."""
    side = images[0].shape[0]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (side + 2), columns * (side + 2), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (side + 2), i % columns * (side + 2)
        sheet[y : y + side, x : x + side] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def main() -> None:
    """Write a contact sheet of scenes and print their captions: look at them before training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), default="world")
    parser.add_argument("--count", type=int, default=64)
    arguments = parser.parse_args()
    sprites = Sprites.load(arguments.work / "sprites")
    of = DISTRIBUTIONS[arguments.distribution](sprites)
    scenes = [compose(sprites, of, "base", i) for i in range(arguments.count)]
    contact_sheet([scene.image for scene in scenes]).save(arguments.work / f"scenes-{arguments.distribution}.png")
    print("\n".join(scene.caption for scene in scenes))


if __name__ == "__main__":
    main()
