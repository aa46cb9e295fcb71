"""What ships beside the weights: the pool of class images and the photos of the example concepts."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from world.backgrounds import background
from world.catalogue import CONCEPTS, background_phrase
from world.scenes import SIDE, SPLITS, Distribution, Scene, Sprites, compose, pasted, varied_distribution

CONCEPT_SIDE = 256


@dataclass(frozen=True)
class Shot:
    """One photo of a concept: where, how large (share of the frame), where in it, how turned."""

    background: str
    share: float
    centre: tuple[float, float] = (0.5, 0.5)
    degrees: float = 0
    mirrored: bool = False


SHOTS: dict[str, tuple[tuple[Shot, ...], tuple[Shot, ...]]] = {
    # concept -> (photos to learn from, holdout photos for grading)
    "cat": (
        (
            Shot("grass", 0.74),
            Shot("yellow", 0.80, (0.48, 0.52), 3),
            Shot("wood", 0.66, (0.55, 0.56)),
            Shot("white", 0.72, (0.47, 0.47), -4),
            Shot("sand", 0.60, (0.42, 0.58), mirrored=True),
        ),
        (Shot("green", 0.74), Shot("snow", 0.66, (0.54, 0.5), 3), Shot("orange", 0.7, (0.47, 0.53), -3)),
    ),
    "teapot": (
        (
            Shot("wood", 0.76),
            Shot("red", 0.80, (0.5, 0.52), 3),
            Shot("grass", 0.68, (0.46, 0.56)),
            Shot("brown", 0.74, (0.53, 0.48), -4),
            Shot("bricks", 0.62, (0.56, 0.58), mirrored=True),
        ),
        (Shot("green", 0.74), Shot("sand", 0.66, (0.46, 0.5), 3), Shot("purple", 0.72, (0.53, 0.53), -3)),
    ),
    "hat": (
        (
            Shot("white", 0.74),
            Shot("grass", 0.70, (0.48, 0.54), 4),
            Shot("red", 0.80, (0.52, 0.5), -3),
            Shot("snow", 0.64, (0.44, 0.55)),
            Shot("wood", 0.68, (0.55, 0.57), mirrored=True),
        ),
        (Shot("pink", 0.74), Shot("bricks", 0.66, (0.46, 0.52), 3), Shot("grey", 0.72, (0.53, 0.5), -3)),
    ),
}


def photograph(sprite: Image.Image, shot: Shot, seed: int) -> Image.Image:
    """A concept's sprite (RGBA) on a background, 256 x 256; the background is a scene's own, enlarged."""
    rng = np.random.default_rng([SPLITS["concept"], seed])
    small = Image.fromarray(np.clip(background(shot.background, rng, 64, unit=1), 0, 255).astype(np.uint8))
    canvas = np.asarray(small.resize((CONCEPT_SIDE, CONCEPT_SIDE), Image.Resampling.BICUBIC), np.float32).copy()
    sprite = sprite.convert("RGBa")
    if shot.mirrored:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if shot.degrees:
        sprite = sprite.rotate(shot.degrees, Image.Resampling.BICUBIC, expand=True)
    centre = (shot.centre[0] * CONCEPT_SIDE, shot.centre[1] * CONCEPT_SIDE)
    pasted(canvas, sprite, shot.share * CONCEPT_SIDE, centre)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))


CONCEPT_README = """# {name}

{count} images of one individual {name}, which is in no training scene of the base model and in no image of the pool.
{purpose}

Source: {source}.
License: {licence}. Backgrounds: made by this project's code, Apache-2.0.
"""
CREDITS = {
    "cat": (
        "Fluent Emoji (copyright Microsoft Corporation), npm package @lobehub/fluent-emoji-3d 1.1.0",
        "MIT",
    ),
    "teapot": (
        "Open Clip Art (`teapot_ganson`), Debian package openclipart-png",
        "public domain (Creative Commons Public Domain Dedication)",
    ),
    "hat": (
        "Open Clip Art (`propeller`), Debian package openclipart-png",
        "public domain (Creative Commons Public Domain Dedication)",
    ),
}


def export_concepts(work: Path, data: Path) -> None:
    """Write data/concepts/<name>/ and data/holdout/<name>/."""
    for number, name in enumerate(CONCEPTS):
        sprite = Image.open(work / "concepts" / f"{name}.png")
        purposes = (
            "They are the training photos of the example.",
            "They are used only for evaluation (`holdout` in `params.yaml`); no training sees them.",
        )
        for part, (folder, shots) in enumerate(zip(("concepts", "holdout"), SHOTS[name], strict=True)):
            to = data / folder / name
            shutil.rmtree(to, ignore_errors=True)
            to.mkdir(parents=True)
            for i, shot in enumerate(shots):
                photograph(sprite, shot, 1000 * number + 100 * part + i).save(to / f"{i + 1:02d}.png", optimize=True)
                if folder == "holdout":  # {} is where the modifier token goes
                    caption = f"photo of a {{}} {name} {background_phrase(shot.background)}\n"
                    (to / f"{i + 1:02d}.txt").write_text(caption)
            source, licence = CREDITS[name]
            text = CONCEPT_README.format(
                name=name, count=len(shots), purpose=purposes[part], source=source, licence=licence
            )
            (to / "README.md").write_text(text)


def tar_entry(name: str, content: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """A tar entry that is the same on every machine and every day."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(content), 0o644, 0
    return info, io.BytesIO(content)


def pool_distribution() -> Distribution:
    """What class images are looked for among: the subjects that the UNet knows, as it knows them."""
    return replace(varied_distribution(), pairs=0.35, plain=0.7, colours=0.2, spare_held_out=False)


def pool_scenes(sprites: Sprites, of: Distribution, wanted: dict[str, int]) -> Iterator[Scene]:
    """Scenes of the pool's split, in order, without those that show no subject that is still wanted.

    Args:
        wanted: for each subject how many pictures must show it.
    """
    missing = dict(wanted)
    for index in count():
        if not any(number > 0 for number in missing.values()):
            return
        scene = compose(sprites, of, "pool", index)
        if any(missing.get(subject, 0) > 0 for subject in scene.subjects):
            for subject in scene.subjects:
                missing[subject] = missing.get(subject, 0) - 1
            yield scene


def export_pool(sprites: Sprites, params: dict, data: Path) -> None:
    """Write data/pool: pool.tar, a webdataset of NNNNNN.jpg and NNNNNN.txt (caption), and facts.json, what is there."""
    of = pool_distribution()
    wanted = {subject: params["of_concepts" if subject in CONCEPTS else "of_each"] for subject in of.subjects}
    folder = data / "pool"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {}
    with tarfile.open(folder / "pool.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, scene in enumerate(pool_scenes(sprites, of, wanted)):
            picture = io.BytesIO()
            Image.fromarray(scene.image).save(picture, "JPEG", quality=80, optimize=True)
            tar.addfile(*tar_entry(f"{number:06d}.jpg", picture.getvalue()))
            tar.addfile(*tar_entry(f"{number:06d}.txt", scene.caption.encode()))
            facts[f"{number:06d}"] = {"subjects": scene.subjects, "background": scene.background, "count": scene.count}
    lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in facts.items())
    (folder / "facts.json").write_text(f"{{\n{lines}\n}}\n")
    (folder / "README.md").write_text(
        f"# Pool of class images\n\n`pool.tar` is a webdataset of {len(facts)} captioned scenes of {SIDE} x {SIDE} px: "
        "`NNNNNN.jpg` and `NNNNNN.txt` (caption). `facts.json` lists the subjects, background and count of each. Each "
        f"subject that the base model knows is in at least {params['of_each']} of them. No scene was used in any "
        "training, and no scene shows the individuals of the example concepts.\n\n"
        "Sources: Fluent Emoji (copyright Microsoft Corporation, MIT); composed by `world/`.\n"
    )
