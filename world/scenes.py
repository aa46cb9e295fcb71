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
from world.captions import caption_of, choice
from world.catalogue import COLOURS, CURRICULUM, EMPHASIS, TEXTURES, UNET_INDIVIDUALS, VARIED

SIDE = 128
CLIP_SIDE = 64  # what both CLIPs see
BACKGROUNDS = (*COLOURS, *TEXTURES)
# Each use has scenes of its own: the judge hears nothing of what the base is trained on, nor is anything graded or
# pooled that either was trained on.
SPLITS = {"base": 0, "judge": 1, "held-out": 2, "pool": 3, "concept": 4}

# size -> longer side of the sprite in pixels, and how far its centre may lie from the middle
SIZES: dict[str, tuple[tuple[int, int], int]] = {
    "very small": ((24, 35), 44),
    "normal": ((56, 108), 20),
    "large": ((84, 108), 6),
    "close up": ((148, 192), 16),
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
    mirrored: bool = False  # flip half of the sprites
    colours: float = 0.0  # how often the caption names a subject's own colour, where the pack knows it


@dataclass
class Scene:
    """A picture, its caption, and what the caption says, for grading.

    Attributes:
        image: (128, 128, 3) uint8.
        sprites: names of the pictures that are shown, from left to right where there are several.
        masks: (S, 128, 128) uint8, for each subject how much of a pixel is its own, 0 to 255.
    """

    image: np.ndarray
    caption: str
    subjects: tuple[str, ...]
    background: str
    size: str
    count: int = 1
    style: str | None = None
    sprites: tuple[str, ...] = ()
    masks: np.ndarray | None = field(default=None, repr=False)


def world_distribution(sprites: Sprites) -> Distribution:
    """Everything there is: what the CLIPs and the VAE learn."""
    return Distribution(subjects=tuple(sprites.pictures))


def detailed_distribution(sprites: Sprites) -> Distribution:
    """What the judge and the decoder learn: everything, either way round, with more pairs and more very small ones."""
    return replace(world_distribution(sprites), pairs=0.25, very_small=0.2, mirrored=True, colours=0.2)


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


def varied_distribution() -> Distribution:
    """The UNet's third phase: twice the subjects, individuals, colours in captions, every size, textures."""
    return Distribution(
        subjects=tuple(subject for subject in VARIED for _ in range(EMPHASIS.get(subject, 1))),
        styles=("3d render",),
        plain=0.6,
        pairs=0.22,
        counts=0.03,
        very_small=0.12,
        close_up=0.10,
        normal="large",
        spare_held_out=True,
        colours=0.4,
    )


def busy_distribution() -> Distribution:
    """The UNet's fourth phase: as the third, with two subjects in a third of the images and more very small ones."""
    return replace(varied_distribution(), pairs=0.36, very_small=0.26, close_up=0.08)


def coloured_distribution() -> Distribution:
    """The UNet's fifth phase: as the fourth, with more pairs, and captions that name most colours.

    Meant to teach which subject a colour belongs to. After 48 minutes of a core it had not: both still get one colour.
    """
    return replace(busy_distribution(), pairs=0.45, colours=0.85)


def balanced_distribution() -> Distribution:
    """The UNet's sixth phase: classes with many individuals more often, most colours named, more very small subjects.

    A pair tells which subject a colour belongs to where both have one; in the fifth phase, those were two in a hundred.
    """
    of = busy_distribution()
    subjects = of.subjects + 2 * tuple(UNET_INDIVIDUALS)
    return replace(of, subjects=subjects, pairs=0.42, very_small=0.4, colours=0.8)


def paired_distribution() -> Distribution:
    """The UNet's seventh phase: as the sixth, with two subjects in half of the images."""
    return replace(balanced_distribution(), pairs=0.5)


DISTRIBUTIONS = {
    "world": world_distribution,
    "curriculum": lambda sprites: curriculum_distribution(),
    "company": lambda sprites: company_distribution(),
    "varied": lambda sprites: varied_distribution(),
    "busy": lambda sprites: busy_distribution(),
    "coloured": lambda sprites: coloured_distribution(),
    "balanced": lambda sprites: balanced_distribution(),
    "paired": lambda sprites: paired_distribution(),
}


def is_held_out(subject: str, background: str) -> bool:
    """True of about one (subject, background) pair in twelve: the UNet is graded on them and never sees them."""
    return zlib.crc32(f"{subject} {background}".encode()) % 12 == 0


@dataclass
class Sprites:
    """The pack in memory: subject -> style -> pictures (premultiplied, Pillow's mode RGBa), with their names."""

    pictures: dict[str, dict[str, list[tuple[str, Image.Image]]]]
    colours: dict[tuple[str, str], str] = field(default_factory=dict)  # (subject, picture) -> the name of its colour

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

    def draw(self, rng: np.random.Generator, subject: str, style: str, background: str) -> tuple[str, Image.Image]:
        """One individual of a subject in a style; none whose colour is the background's, where there are others."""
        everyone = self.pictures[subject][style]
        found = [one for one in everyone if self.colours.get((subject, one[0])) != background] or everyone
        return found[rng.integers(len(found))]


def pasted(
    canvas: np.ndarray, sprite: Image.Image, longer: float, centre: tuple[float, float]
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Paste a premultiplied sprite into `canvas` (H, W, 3) in place; `longer` and `centre` (x, y) in its pixels.

    Returns:
        The rows and columns that it covers, and its opacity there in 0..1.
    """
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
    alpha = part[..., 3] / 255
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha[..., None]) + part[..., :3]
    return (slice(y0, y1), slice(x0, x1)), alpha


@dataclass(frozen=True)
class Placement:
    """One sprite in a scene: its longer side and its centre (x, y) in pixels."""

    subject: str
    name: str
    sprite: Image.Image
    longer: float
    centre: tuple[float, float]


def kind_of_scene(
    rng: np.random.Generator, sprites: Sprites, of: Distribution, subject: str, style: str
) -> tuple[tuple[str, ...], int, str]:
    """Subjects, count and size: two different subjects, two or three of one, or one in some size."""
    draw = rng.random()
    if draw < of.pairs:
        others = [s for s in of.subjects if s != subject and style in sprites.pictures[s]]
        return (subject, choice(rng, others)), 2, of.normal
    if draw < of.pairs + of.counts:
        return (subject,), int(rng.integers(2, 4)), of.normal
    draw = rng.random()
    if draw < of.very_small:
        return (subject,), 1, "very small"
    if draw < of.very_small + of.close_up:
        return (subject,), 1, "close up"
    return (subject,), 1, of.normal


def placements(
    rng: np.random.Generator,
    sprites: Sprites,
    subjects: tuple[str, ...],
    style: str,
    count: int,
    size: str,
    background: str,
) -> list[Placement]:
    """Where the sprites go: one by its size's rules, several side by side."""
    if count == 1:
        name, sprite = sprites.draw(rng, subjects[0], style, background)
        (low, high), spread = SIZES[size]
        centre = SIDE / 2 + rng.uniform(-spread, spread, 2)
        return [Placement(subjects[0], name, sprite, rng.uniform(low, high), tuple(centre))]
    columns, longest = ((36, 92), 52) if count == 2 else ((26, 64, 102), 38)
    individual = sprites.draw(rng, subjects[0], style, background)
    placed = []
    for i, x in enumerate(columns):
        name, sprite = individual if len(subjects) == 1 else sprites.draw(rng, subjects[i], style, background)
        longer = longest * rng.uniform(0.85, 1.12)
        centre = (x + rng.uniform(-4, 4), SIDE / 2 + rng.uniform(-14, 14))
        placed.append(Placement(subjects[0 if len(subjects) == 1 else i], name, sprite, longer, centre))
    return placed


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
    subjects, count, size = ((subject,), 1, of.normal) if fixed else kind_of_scene(rng, sprites, of, subject, style)

    canvas = draw_background(background, rng, SIDE).copy()
    masks = np.zeros((len(subjects), SIDE, SIDE), np.float32)
    placed = placements(rng, sprites, subjects, style, count, size, background)
    for placement in placed:
        sprite = placement.sprite
        if of.mirrored and rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        window, alpha = pasted(canvas, sprite, placement.longer, placement.centre)
        masks[(..., *window)] *= 1 - alpha  # what is pasted later lies in front
        masks[(subjects.index(placement.subject), *window)] += alpha
    said = [
        sprites.colours.get((p.subject, p.name)) if of.colours and rng.random() < of.colours else None for p in placed
    ]
    caption = caption_of(rng, subjects, count, style, background, size, tuple(said[: len(subjects)]))
    return Scene(
        image=np.clip(canvas + 0.5, 0, 255).astype(np.uint8),
        caption=caption,
        subjects=subjects,
        background=background,
        size=size,
        count=count,
        style=style,
        sprites=tuple(p.name for p in placed),
        masks=np.clip(255 * masks + 0.5, 0, 255).astype(np.uint8),
    )


def place_alone(rng: np.random.Generator, sprite: Image.Image, background: str) -> np.ndarray:
    """An image (128, 128, 3) uint8 of one sprite in any size, place and direction, all of it or nearly so in sight."""
    canvas = draw_background(background, rng, SIDE).copy()
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    longer = rng.uniform(0.35, 1.0) * SIDE
    spread = (SIDE - longer) / 2 + 6
    pasted(canvas, sprite, longer, tuple(SIDE / 2 + rng.uniform(-spread, spread, 2)))
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def to_tensor(images: list[np.ndarray], side: int | None = None):
    """uint8 images (H, W, 3) to a float tensor (N, 3, H, W) in -1..1, the range of the VAE and the CLIPs.

    Args:
        side: scale the images down to this side, by the mean of what falls into a pixel.
    """
    import torch
    from torch.nn import functional as F

    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch if side is None else F.adaptive_avg_pool2d(batch, side)


def contact_sheet(images: list[np.ndarray], columns: int = 8, scale: int = 1) -> Image.Image:
    """Images of one size, side by side."""
    side = images[0].shape[0]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (side + 2), columns * (side + 2), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (side + 2), i % columns * (side + 2)
        sheet[y : y + side, x : x + side] = image
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def main() -> None:
    """Write a contact sheet of scenes and print their captions: look at them before training."""
    from world.individuals import training_pack  # which needs this module

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), default="world")
    parser.add_argument("--count", type=int, default=64)
    arguments = parser.parse_args()
    sprites = training_pack(arguments.work, arguments.distribution)
    of = DISTRIBUTIONS[arguments.distribution](sprites)
    scenes = [compose(sprites, of, "base", i) for i in range(arguments.count)]
    contact_sheet([scene.image for scene in scenes]).save(arguments.work / f"scenes-{arguments.distribution}.png")
    print("\n".join(scene.caption for scene in scenes))


if __name__ == "__main__":
    main()
