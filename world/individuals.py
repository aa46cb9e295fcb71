"""Individuals: a picture in another colour, pattern or shape, so that a class is not one picture."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from world.catalogue import CONCEPT_HUES, INDIVIDUALS, UNET_INDIVIDUALS, VARIED
from world.scenes import Sprites
from world.sprites import TONES, toned, turned

PATTERNS = ("striped", "spotted")
HUE_DISTANCE = 40  # degrees that an individual stays away from a concept of its class
ASIDE = 5  # every fifth individual is kept out of the UNet's training, for grading


@dataclass(frozen=True)
class Look:
    """What makes an individual out of a picture.

    Attributes:
        hue: degrees that the hue is turned by.
        tone: a name in `sprites.TONES`, instead of a turned hue.
        pattern: a name in `PATTERNS`, painted over the picture in a darker shade.
        stretch: width over height, relative to the picture's own.
    """

    hue: float = 0.0
    tone: str | None = None
    pattern: str | None = None
    stretch: float = 1.0

    def __str__(self) -> str:
        return "@".join(
            [self.tone or f"{self.hue:.0f}", *([self.pattern] if self.pattern else []), f"{100 * self.stretch:.0f}"]
        )


def mean_hue(picture: Image.Image) -> tuple[float, float, float, float]:
    """Mean hue in degrees, its coherence in 0..1, and mean chroma and value in 0..1, of an RGBA picture.

    The hue is the direction of the mean vector on the colour circle, each pixel as long as its chroma; coherence is
    the length of that vector over the mean chroma: 1 where all pixels have one hue.
    """
    rgba = np.asarray(picture.convert("RGBA"), np.float32) / 255
    rgb = rgba[rgba[..., 3] > 0.5][:, :3]
    if not len(rgb):
        return 0.0, 0.0, 0.0, 0.0
    value, chroma = rgb.max(axis=1), rgb.max(axis=1) - rgb.min(axis=1)
    r, g, b = rgb.T
    vector = (r - 0.5 * (g + b)) + 1j * np.sqrt(0.75) * (g - b)  # the hexagon's circle; as long as the chroma, nearly
    mean = vector.mean()
    coherence = abs(mean) / max(float(np.abs(vector).mean()), 1e-6)
    return float(np.degrees(np.angle(mean)) % 360), float(coherence), float(chroma.mean()), float(value.mean())


# upper ends of the hues that have a name, in degrees
HUE_NAMES = ((14, "red"), (41, "orange"), (68, "yellow"), (165, "green"), (250, "blue"), (292, "purple"), (345, "pink"))


def colour_word(picture: Image.Image) -> str | None:
    """The name of an RGBA picture's colour among the world's eleven, or None where it has several."""
    hue, coherence, chroma, value = mean_hue(picture)
    if chroma < 0.1:
        return "white" if value > 0.75 else "black" if value < 0.3 else "grey"
    if coherence < 0.8:
        return None
    name = next((name for end, name in HUE_NAMES if hue < end), "red")
    return "brown" if name in ("red", "orange", "yellow") and value < 0.5 else name


def patterned(picture: Image.Image, pattern: str, seed: int) -> Image.Image:
    """An RGBA picture with stripes or spots in a darker shade of its own colours."""
    rng = np.random.default_rng([seed, 41])
    rgba = np.asarray(picture.convert("RGBA"), np.float32)
    y, x = np.mgrid[: rgba.shape[0], : rgba.shape[1]].astype(np.float32) / max(rgba.shape[:2])
    if pattern == "striped":
        angle = rng.uniform(-0.4, 0.4)
        wave = np.sin(2 * np.pi * (8 * (x * np.cos(angle) + y * np.sin(angle)) + 0.2 * np.sin(9 * y)))
        share = np.clip(3 * (wave - 0.25), 0, 1)
    else:
        share = np.zeros_like(x)
        for cx, cy, radius in zip(*rng.uniform(0, 1, (2, 26)), rng.uniform(0.035, 0.07, 26), strict=True):
            share = np.maximum(share, np.clip(60 * (radius - np.hypot(x - cx, y - cy)), 0, 1))
    rgba[..., :3] *= 1 - 0.5 * share[..., None]
    return Image.fromarray(np.clip(rgba + 0.5, 0, 255).astype(np.uint8), "RGBA")


def dressed(picture: Image.Image, look: Look) -> Image.Image:
    """The individual that `look` makes of an RGBA picture."""
    if look.tone:
        picture = toned(picture, look.tone)
    elif look.hue:
        picture = turned(picture, look.hue)
    if look.pattern:
        picture = patterned(picture, look.pattern, zlib.crc32(str(look).encode()))
    if look.stretch != 1:
        width, height = picture.size
        longer = max(width, height)
        scale = longer / max(width * look.stretch, height)
        size = (max(1, round(width * look.stretch * scale)), max(1, round(height * scale)))
        picture = picture.convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA")
    return picture


def near_concept(subject: str, picture: Image.Image) -> bool:
    """True of a picture whose hue is a held-out concept's of the same class: it may be in no training."""
    if subject not in CONCEPT_HUES:
        return False
    hue, coherence, chroma, _ = mean_hue(picture)
    distance = abs((hue - CONCEPT_HUES[subject] + 180) % 360 - 180)
    return chroma >= 0.1 and coherence > 0.5 and distance < HUE_DISTANCE


def looks(subject: str, count: int) -> list[Look]:
    """The first `count` looks of a subject's individuals, always the same ones: hues all around, then tones."""
    found = []
    for number in range(count):
        rng = np.random.default_rng([zlib.crc32(subject.encode()), number])
        tone = list(TONES)[number // 3 % len(TONES)] if number % 3 == 2 else None
        hue = 0.0 if tone else float(round(360 * (number * 0.381966 % 1)))  # the golden angle spreads them
        pattern = PATTERNS[rng.integers(2)] if rng.random() < 0.3 else None
        found.append(Look(hue, tone, pattern, float(round(rng.uniform(0.85, 1.18), 2))))
    return found


def with_individuals(
    sprites: Sprites, counts: dict[str, int], *, aside: bool = False, colour_only: bool = False
) -> Sprites:
    """The pack with further individuals of the subjects in `counts`, none near a concept.

    Args:
        counts: individuals made of each of a subject's pictures.
        aside: only the individuals that are kept out of training (one in five), instead of all others.
        colour_only: without patterns, and in the pictures' own proportions.
    """
    pictures = {
        subject: {style: list(found) for style, found in styles.items()} for subject, styles in sprites.pictures.items()
    }
    for subject, count in counts.items():
        kept = [look for number, look in enumerate(looks(subject, count)) if (number % ASIDE == ASIDE - 1) == aside]
        if colour_only:
            kept = [replace(look, pattern=None, stretch=1.0) for look in kept]
        for style, found in sprites.pictures[subject].items():
            made = []
            for name, picture in found:
                whole = picture.convert("RGBA")
                for look in kept:
                    other = dressed(whole, look)
                    if not near_concept(subject, other):
                        made.append((f"{name}@{look}", other.convert("RGBa")))
            pictures[subject][style] = made if aside else [*found, *made]
    return replace(sprites, pictures=pictures)


def with_colours(sprites: Sprites, subjects: Iterable[str] = INDIVIDUALS) -> Sprites:
    """The pack with the name of each picture's colour, where it has one: of the subjects that have individuals."""
    named = {
        (subject, name): colour_word(picture)
        for subject in subjects
        for found in sprites.pictures[subject].values()
        for name, picture in found
    }
    return replace(sprites, colours={key: word for key, word in named.items() if word})


def training_pack(work: Path, distribution: str) -> Sprites:
    """The sprites that a distribution's scenes are made of: with individuals and colours from the third phase on.

    The sixth phase names colours of all its subjects. Individuals differ in colour alone: with patterns and proportions
    as well, and both directions, a UNet of 2.5 M parameters drew no cat after 16 minutes of a core, only stripes.
    """
    sprites = Sprites.load(work / "sprites")
    if distribution in ("world", "curriculum", "company"):
        return sprites
    named = VARIED if distribution == "balanced" else INDIVIDUALS
    return with_colours(with_individuals(sprites, UNET_INDIVIDUALS, colour_only=True), named)


def with_more_individuals(sprites: Sprites, colours: dict[str, list[int | str]]) -> Sprites:
    """The pack with further individuals: pictures of the subjects in `colours`, their hue turned or their tone changed.

    Args:
        colours: for each subject degrees of hue, for individuals that were not turned yet, or names in `sprites.TONES`.
    """
    pictures = {
        subject: {style: list(found) for style, found in styles.items()} for subject, styles in sprites.pictures.items()
    }
    for subject, changes in colours.items():
        for style, found in sprites.pictures[subject].items():
            for name, picture in found:
                whole = picture.convert("RGBA")
                for change in changes:
                    if isinstance(change, str) or "@" not in name:
                        other = toned(whole, change) if isinstance(change, str) else turned(whole, change)
                        pictures[subject][style].append((f"{name}@{change}", other.convert("RGBa")))
    return replace(sprites, pictures=pictures)
