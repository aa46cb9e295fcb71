"""Backgrounds made by code: plain colours and textures, as (H, W, 3) float arrays in 0..255."""

from functools import cache

import numpy as np
from PIL import Image

from world.catalogue import COLOURS, TEXTURES

UNIT = 2  # pixels of one unit: textures are drawn in units, so that they look alike at every resolution
BANK_UNITS = 160
BANK_SIZE = 6


def noise(rng: np.random.Generator, side: int, cells: tuple[int, int]) -> np.ndarray:
    """Smooth noise in -1..1, (side, side): a random grid of `cells` (rows, columns), scaled up."""
    grid = Image.fromarray(rng.uniform(-1, 1, cells).astype(np.float32))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))


def tinted(colour: tuple[int, int, int], light: np.ndarray) -> np.ndarray:
    """A colour whose brightness varies by `light` (H, W), in units of 8 bit values."""
    return np.asarray(colour, np.float32) + light[..., None]


def blended(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """`above` over `below`, where `share` (H, W) is 1."""
    return below + (above - below) * np.clip(share, 0, 1)[..., None]


def texture(name: str, rng: np.random.Generator, units: int = BANK_UNITS, unit: int = UNIT) -> np.ndarray:
    """One large image of a texture, (units * unit, units * unit, 3)."""
    side = units * unit
    y, x = np.mgrid[:side, :side].astype(np.float32) / unit
    fine, rough = noise(rng, side, (units // 2, units // 2)), noise(rng, side, (units // 10, units // 10))
    match name:
        case "grass":
            blades = noise(rng, side, (units // 6, units // 2))
            return tinted((82, 158, 60), 26 * blades + 12 * rough)
        case "sand":
            return tinted((226, 198, 140), 10 * fine + 8 * rough)
        case "snow":
            return tinted((234, 240, 250), 5 * fine - 12 * np.clip(rough, 0, 1))
        case "water":
            waves = np.sin(2 * np.pi * (y / 9 + 0.6 * noise(rng, side, (units // 20, units // 10))))
            return tinted((40, 140, 190), 20 * waves + 6 * rough)
        case "bricks":
            row = y // 8
            mortar = (y % 8 < 2) | ((x + 8 * (row % 2)) % 16 < 2)
            return blended(tinted((172, 78, 58), 10 * fine), tinted((206, 196, 184), 4 * fine), mortar)
        case "wood":
            grain = np.sin(2 * np.pi * (y / 5 + noise(rng, side, (units // 10, units // 40))))
            seam = y % 16 < 2
            return blended(tinted((180, 124, 70), 9 * grain + 8 * rough), tinted((110, 70, 36), 0 * y), seam)
        case "sky":
            clouds = 2.2 * noise(rng, side, (units // 14, units // 24)) - 0.4
            return blended(tinted((124, 190, 240), 0 * y), tinted((250, 250, 252), 0 * y), clouds)
        case "night":
            stars = np.zeros((units, units), np.float32)
            stars[tuple(rng.integers(0, units, (2, units * units // 90)))] = 1
            return blended(
                tinted((18, 22, 62), 6 * rough),
                tinted((240, 236, 190), 0 * y),
                np.kron(stars, np.ones((unit, unit), np.float32)),
            )
        case "checkered":
            return tinted((140, 140, 144), 78 * ((x // 8 + y // 8) % 2 * 2 - 1) + 3 * fine)
        case "stripes":
            dark = (x // 8) % 2
            return blended(tinted((250, 244, 230), 0 * y), tinted((214, 84, 96), 0 * y), dark)
    raise ValueError(f"no texture {name!r}; known: {', '.join(TEXTURES)}")


@cache
def bank(name: str, unit: int = UNIT) -> tuple[np.ndarray, ...]:
    """A few large images of a texture, always the same ones; scenes cut their backgrounds from them."""
    rng = np.random.default_rng([list(TEXTURES).index(name), 77])
    return tuple(np.clip(texture(name, rng, unit=unit), 0, 255) for _ in range(BANK_SIZE))


def background(name: str, rng: np.random.Generator, side: int = 128, unit: int = UNIT) -> np.ndarray:
    """A background of that name, (side, side, 3) float in 0..255: a colour a little off its mean, or a cut-out."""
    if name in COLOURS:
        colour = np.asarray(COLOURS[name], np.float32) + rng.normal(0, 5, 3) + rng.normal(0, 3)
        slope = np.linspace(-1, 1, side, dtype=np.float32)[:, None, None] * rng.uniform(-6, 6)
        return np.clip(np.broadcast_to(colour + slope, (side, side, 3)), 0, 255).astype(np.float32)
    picture = bank(name, unit)[rng.integers(BANK_SIZE)]
    top, left = rng.integers(0, BANK_UNITS * unit - side + 1, 2)
    return picture[top : top + side, left : left + side]
