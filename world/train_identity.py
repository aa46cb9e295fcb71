"""Train the identity encoder: images of one individual are near, of another of its class far, on any background.

A vision transformer that starts as the first layers of the base's CLIP, trained with the supervised contrastive loss
(Khosla et al. 2020, equation 2) on batches with several individuals of each class. Some classes and looks are kept out.
`--export` writes data/identity and how often the right individual is ranked first.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging

from world.backgrounds import background
from world.captions import choice
from world.individuals import PATTERNS, Look, dressed, near_concept
from world.loop import fit, load_params, trainer_arguments
from world.scenes import BACKGROUNDS, CLIP_SIDE, Sprites, pasted, to_tensor
from world.sprites import TONES

SPRITE_SIDE = 96  # px
ASIDE = 5  # every fifth look is kept out of the training
THUMBNAIL, LEAST_DIFFERENCE = 16, 0.06  # two individuals differ by at least this, of 0..1, at this size


@dataclass(frozen=True)
class Individual:
    """One individual: its class, its picture and look, and whether its look is kept out of the training."""

    subject: str
    name: str
    sprite: Image.Image
    is_aside: bool


def looks(name: str, hues: int) -> list[Look]:
    """Looks of a picture's individuals, always the same ones: hues all around and tones, some with a pattern."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), 5])
    colors = [(360 * number / hues, None) for number in range(hues)] + [(0.0, tone) for tone in TONES]
    return [
        Look(hue, tone, choice(rng, PATTERNS) if rng.random() < 0.3 else None, round(float(rng.uniform(0.8, 1.25)), 2))
        for hue, tone in colors
    ]


def thumbnail(sprite: Image.Image) -> np.ndarray:
    """What two individuals are compared by, in 0..1."""
    small = sprite.convert("RGBa").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.frombuffer(small.tobytes(), np.uint8).astype(np.float32) / 255


def individuals_of(
    subject: str, name: str, picture: Image.Image, hues: int, seen: list[np.ndarray]
) -> list[Individual]:
    """The individuals that a picture (premultiplied) is made into; none looks like another, or like a concept.

    Args:
        seen: thumbnails of the class's individuals, which grow by those found.
    """
    whole = picture.convert("RGBA")
    whole.thumbnail((SPRITE_SIDE, SPRITE_SIDE))
    found = []
    for number, look in enumerate(looks(f"{subject}/{name}", hues)):
        other = dressed(whole, look)
        small = thumbnail(other)
        if near_concept(subject, other) or any(np.abs(small - each).mean() < LEAST_DIFFERENCE for each in seen):
            continue
        seen.append(small)
        is_aside = number % ASIDE == ASIDE - 1
        found.append(Individual(subject, f"{name}@{look}", other.convert("RGBa"), is_aside))
    return found


def all_individuals(sprites: Sprites, hues: int) -> dict[str, list[list[Individual]]]:
    """By class, for each of its pictures the individuals made of it."""
    everyone = {}
    for subject, styles in sprites.pictures.items():
        seen: list[np.ndarray] = []
        pictures = [each for found in styles.values() for each in found]
        everyone[subject] = [individuals_of(subject, name, picture, hues, seen) for name, picture in pictures]
    return everyone


def photograph(rng: np.random.Generator, sprite: Image.Image, place: str | None = None) -> np.ndarray:
    """A photo (64, 64, 3) uint8 of an individual: any background, size and place, a little blurred, a little lit."""
    canvas = background(place or choice(rng, BACKGROUNDS), rng, CLIP_SIDE).copy()
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        sprite = sprite.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    longer = rng.uniform(0.4, 1.05) * CLIP_SIDE
    spread = abs(CLIP_SIDE - longer) / 2 + 3
    pasted(canvas, sprite, longer, tuple(CLIP_SIDE / 2 + rng.uniform(-spread, spread, 2)))
    light = rng.uniform(0.93, 1.07) * rng.uniform(0.97, 1.03, 3)
    image = np.clip(canvas * light + rng.normal(0, rng.uniform(0, 4), canvas.shape) + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
        image = np.asarray(blurred)
    return image


def build(params: dict, clip: CLIPVisionModel) -> CLIPVisionModel:
    """The first layers of a CLIP's vision encoder."""
    config = CLIPVisionConfig(**{**clip.config.to_dict(), "num_hidden_layers": params["layers"]})
    model = CLIPVisionModel(config)
    wanted = model.state_dict()
    model.load_state_dict({name: value for name, value in clip.state_dict().items() if name in wanted})
    return model


def embed(model: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """Unit features (B, D) of images (B, 3, 64, 64) in -1..1: the class token of the last layer."""
    return F.normalize(model(pixel_values=images).last_hidden_state[:, 0], dim=-1)


def contrastive_loss(features: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, torch.Tensor]:
    """The supervised contrastive loss of unit features (B, D), and how often the nearest image is of one's own."""
    similarity = features @ features.T / temperature
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    similarity = similarity.masked_fill(itself, -1e4)
    own = (labels[:, None] == labels) & ~itself
    log_share = similarity - similarity.logsumexp(dim=1, keepdim=True)
    loss = -(log_share * own).sum(1) / own.sum(1)
    return {"loss": loss.mean(), "first": own.gather(1, similarity.argmax(1, keepdim=True)).float().mean()}


def batch_at(step: int, pack: dict[str, list[list[Individual]]], params: dict) -> tuple[list[np.ndarray], list[int]]:
    """Photos of some classes, of each several individuals, of each several photos; and a number for each individual."""
    rng = np.random.default_rng([79, step])
    images, labels = [], []
    for subject in rng.choice(list(pack), params["classes"], replace=False):
        groups = pack[str(subject)]
        chosen: list[Individual] = []
        for group in (groups[i] for i in rng.permutation(len(groups))):  # two looks of a picture, then of the next one
            chosen += [group[i] for i in rng.permutation(len(group))[:2]]
        if len(chosen) < params["individuals"]:
            rest = [one for group in groups for one in group if all(one is not other for other in chosen)]
            chosen += [rest[i] for i in rng.permutation(len(rest))]
        for individual in chosen[: params["individuals"]]:
            label = len(set(labels))
            images += [photograph(rng, individual.sprite) for _ in range(params["photos"])]
            labels += [label] * params["photos"]
    return images, labels


@torch.no_grad()
def features_of(model: CLIPVisionModel, images: Sequence[np.ndarray]) -> np.ndarray:
    """Unit features (N, D) of images (64, 64, 3) uint8."""
    return np.concatenate(
        [embed(model, to_tensor(list(images[i : i + 64]))).numpy() for i in range(0, len(images), 64)]
    )


def first_rate(model: CLIPVisionModel, groups: list[list[Individual]], among: int, trials: int) -> float:
    """How often the right individual is first: mean cosine of a photo to five photos of each of `among` individuals.

    Args:
        groups: individuals by class.
        trials: photos that are asked about, for each class.
    """
    right = []
    for number, everyone in enumerate(groups):
        rng = np.random.default_rng([80, number])
        chosen = [everyone[i] for i in rng.permutation(len(everyone))[:among]]
        gallery = [photograph(rng, one.sprite) for one in chosen for _ in range(5)]
        asked = [int(rng.integers(len(chosen))) for _ in range(trials)]
        queries = features_of(model, [photograph(rng, chosen[i].sprite) for i in asked])
        scores = (queries @ features_of(model, gallery).T).reshape(trials, len(chosen), 5).mean(2)
        right += list(scores.argmax(1) == np.array(asked))
    return float(np.mean(right))


def grade(model: CLIPVisionModel, sprites: Sprites, params: dict) -> dict[str, float]:
    """Rates at which the right individual is ranked first: unseen looks of known classes, and unseen classes."""
    everyone = {
        subject: [one for found in pictures for one in found]
        for subject, pictures in all_individuals(sprites, params["hues"]).items()
    }
    unseen = set(params["unseen_subjects"])
    aside = {subject: [one for one in found if one.is_aside] for subject, found in everyone.items()}
    groups = {
        "unseen looks": [found for subject, found in aside.items() if subject not in unseen and len(found) >= 10],
        "unseen classes": [everyone[subject] for subject in sorted(unseen)],
    }
    return {name: round(first_rate(model, found, 20, params["graded"]), 4) for name, found in groups.items()}


def export(model: CLIPVisionModel, folder: Path) -> None:
    """The encoder as transformers loads it, fp16, with its image processor."""
    model.half().save_pretrained(folder)
    side, half = {"height": CLIP_SIDE, "width": CLIP_SIDE}, [0.5] * 3
    CLIPImageProcessorPil(size=side, do_center_crop=False, image_mean=half, image_std=half).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, or continue; with `--export` write and grade what was trained."""
    arguments = trainer_arguments(__doc__, "identity")
    params = load_params("identity")
    logging.set_verbosity_error()
    torch.manual_seed(params["seed"])
    sprites = Sprites.load(arguments.work / "sprites")
    model = build(params, CLIPVisionModel.from_pretrained(arguments.clip, dtype=torch.float32))
    folder = arguments.work / "identity"
    if arguments.export:
        model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
        figures = grade(model.eval(), sprites, params)
        (folder / "grade.json").write_text(json.dumps(figures, indent=1) + "\n")
        export(model, arguments.data / "identity")
        print(json.dumps(figures))
        return
    seen = {subject: styles for subject, styles in sprites.pictures.items() if subject not in params["unseen_subjects"]}
    everyone = all_individuals(Sprites(seen), params["hues"])
    kept = {subject: [[i for i in group if not i.is_aside] for group in groups] for subject, groups in everyone.items()}
    pack = {subject: [g for g in groups if g] for subject, groups in kept.items() if any(len(g) > 1 for g in groups)}

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        images, labels = batch_at(step, pack, params)
        features = embed(model, to_tensor(images).to(arguments.device))
        return contrastive_loss(features, torch.tensor(labels, device=arguments.device), params["temperature"])

    fit(
        folder,
        model.to(arguments.device).train(),
        loss_at,
        minutes=arguments.minutes or params["minutes"],
        peak_lr=params["peak_lr"],
        weight_decay=params["weight_decay"],
        muon=params["muon"],
        seed=params["seed"],
        device=arguments.device,
        restart=arguments.restart,
    )


if __name__ == "__main__":
    main()
