"""Labelled scenes for models beside the base: segmenter, captioner, identity encoder.

    python -m world.datasets masks        images, and for each named class a mask
    python -m world.datasets captions     images, captions, and what the captions say
    python -m world.datasets individuals  several images each of many individuals of one class

Each writes `build/<name>-<split>.npz`; `--split held-out` gives scenes that no training sees.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from world.catalogue import INDIVIDUALS, STYLES
from world.individuals import with_colours, with_individuals
from world.latents import save_arrays
from world.scenes import BACKGROUNDS, SIDE, Distribution, Sprites, compose, place_alone, varied_distribution

FIRST_SCENE = 40_000_000  # other scenes than the VAE's and the UNet's


def rich_distribution() -> Distribution:
    """The UNet's subjects in more ways than it draws them: every style, both directions, more often several."""
    return replace(
        varied_distribution(), styles=STYLES, mirrored=True, pairs=0.3, normal="normal", spare_held_out=False
    )


def scene_masks(sprites: Sprites, of: Distribution, split: str, count: int) -> dict[str, np.ndarray]:
    """Images with a mask for each class in them.

    Returns:
        images: (N, 128, 128, 3) uint8.
        masks: (M, 128, 128) uint8, 255 where a pixel is the class's own.
        image: (M,) int32, each mask's picture.
        prompts: (M,) str, each mask's class.
    """
    images, masks, image, prompts = [], [], [], []
    for i in tqdm(range(count), desc="masks", mininterval=10):
        scene = compose(sprites, of, split, FIRST_SCENE + i)
        images.append(scene.image)
        for subject, mask in zip(scene.subjects, scene.masks, strict=True):
            masks.append(mask)
            image.append(i)
            prompts.append(subject)
    return {
        "images": np.stack(images),
        "masks": np.stack(masks),
        "image": np.array(image, np.int32),
        "prompts": np.array(prompts),
    }


def scene_captions(sprites: Sprites, of: Distribution, split: str, count: int) -> dict[str, np.ndarray]:
    """Images with their captions.

    Returns:
        images: (N, 128, 128, 3) uint8.
        captions: (N,) str.
        facts: (N,) str, JSON of subjects, background, size and count.
    """
    scenes = [compose(sprites, of, split, FIRST_SCENE + i) for i in tqdm(range(count), desc="captions", mininterval=10)]
    facts = [
        json.dumps({"subjects": s.subjects, "background": s.background, "size": s.size, "count": s.count})
        for s in scenes
    ]
    return {
        "images": np.stack([s.image for s in scenes]),
        "captions": np.array([s.caption for s in scenes]),
        "facts": np.array(facts),
    }


def pictures_by_individual(sprites: Sprites, style: str, each: int, seed: int) -> dict[str, np.ndarray]:
    """Images of each individual of the classes that have many, on any background, in any size, place and direction.

    Returns:
        images: (N, 128, 128, 3) uint8.
        individual: (N,) int32, the same for images of one individual.
        names: (K,) str, "<class>/<picture>@<look>" of each individual.
        classes: (K,) str, each individual's class.
    """
    images, individual, names, classes = [], [], [], []
    for subject in INDIVIDUALS:
        for name, sprite in sprites.pictures[subject].get(style, ()):
            for i in range(each):
                rng = np.random.default_rng([seed, len(names), i])
                background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
                images.append(place_alone(rng, sprite, background))
                individual.append(len(names))
            names.append(f"{subject}/{name}")
            classes.append(subject)
    return {
        "images": np.stack(images),
        "individual": np.array(individual, np.int32),
        "names": np.array(names),
        "classes": np.array(classes),
    }


def main() -> None:
    """Write one of the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["masks", "captions", "individuals"])
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--split", choices=["base", "held-out"], default="base")
    parser.add_argument("--count", type=int, default=8000, help="Scenes.")
    parser.add_argument("--each", type=int, default=16, help="Images of each individual.")
    arguments = parser.parse_args()
    held_out = arguments.split == "held-out"
    if arguments.name == "individuals":
        sprites = with_individuals(Sprites.load(arguments.work / "sprites"), INDIVIDUALS, aside=held_out)
        arrays = pictures_by_individual(sprites, "3d render", arguments.each, seed=int(held_out))
    else:
        make = scene_masks if arguments.name == "masks" else scene_captions
        sprites = with_colours(with_individuals(Sprites.load(arguments.work / "sprites"), INDIVIDUALS))
        arrays = make(sprites, rich_distribution(), arguments.split, arguments.count)
    save_arrays(arguments.work / f"{arguments.name}-{arguments.split}.npz", **arrays)
    print({name: array.shape for name, array in arrays.items()}, f"{SIDE} px")


if __name__ == "__main__":
    main()
