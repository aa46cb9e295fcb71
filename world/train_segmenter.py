"""Train the segmenter: 64 x 64 images to the subject's mask, a tiny SegFormer (Xie et al. 2021) of two labels.

Masks are exact: each sprite's silhouette is pasted beside its picture. Some individuals are kept out of the training:
whole subjects, and every subject in some colours. `--export` writes data/segmenter and the IoU on both.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from world import scenes
from world.backgrounds import background, noise
from world.individuals import with_more_individuals
from world.loop import fit, load_params
from world.scenes import BACKGROUNDS, SIZES, SPLITS, Sprites, choice, pasted, to_tensor
from world.sprites import toned, turned

SIZE_SHARES = {"very small": 0.1, "normal": 0.4, "large": 0.4, "close up": 0.1}
SIDE = 64  # px; photos are scaled to it
FIRST_HELD_OUT = 50_000_000  # scenes from this number on are only measured


def build(params: dict) -> SegformerForSemanticSegmentation:
    """A SegFormer of stride 2 at each of its four levels: logits at half the image's resolution."""
    widths = params["widths"]
    config = SegformerConfig(
        num_labels=2,
        id2label={0: "background", 1: "subject"},
        label2id={"background": 0, "subject": 1},
        num_encoder_blocks=len(widths),
        hidden_sizes=widths,
        depths=params["depths"],
        sr_ratios=params["reductions"],
        num_attention_heads=params["heads"],
        patch_sizes=[3] * len(widths),
        strides=[2] * len(widths),
        mlp_ratios=[3] * len(widths),
        decoder_hidden_size=params["decoder"],
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def split_individuals(sprites: Sprites, params: dict) -> tuple[Sprites, Sprites, Sprites]:
    """Packs of individuals to learn from, of seen subjects in unseen colours, and of unseen subjects."""
    unseen = set(params["unseen_subjects"])
    seen = {subject: styles for subject, styles in sprites.pictures.items() if subject not in unseen}
    learned = with_more_individuals(Sprites(seen), dict.fromkeys(seen, params["colours"]))
    recoloured = {
        subject: {
            style: [(f"{name}@{change}", recolour(picture, change)) for name, picture in found
                    for change in params["unseen_colours"]]
            for style, found in styles.items()
        }
        for subject, styles in seen.items()
    }  # fmt: skip
    return learned, Sprites(recoloured), Sprites({subject: sprites.pictures[subject] for subject in sorted(unseen)})


def recolour(picture: Image.Image, change: int | str) -> Image.Image:
    """A premultiplied sprite with its hue turned by degrees, or in a tone of `sprites.TONES`."""
    whole = picture.convert("RGBA")
    return (toned(whole, change) if isinstance(change, str) else turned(whole, change)).convert("RGBa")


def silhouette(sprite: Image.Image) -> Image.Image:
    """A premultiplied sprite, wholly white: pasted on black it gives its coverage."""
    return Image.merge("RGBa", [sprite.getchannel("a")] * 4)


def ground(rng: np.random.Generator) -> np.ndarray:
    """A background (64, 64, 3): mostly the world's own, else two random colors blended by smooth noise."""
    if rng.random() < 0.7:
        return background(choice(rng, BACKGROUNDS), rng, SIDE).copy()
    low, high = rng.uniform(0, 255, (2, 3))
    cells = int(rng.integers(2, 24))
    share = np.clip(0.5 + rng.uniform(0, 1.5) * noise(rng, SIDE, (cells, cells)), 0, 1)[..., None]
    return (low + (high - low) * share).astype(np.float32)


def scene(sprites: Sprites, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene number `index`: the image (64, 64, 3) uint8 and how far each pixel shows a subject (64, 64) in 0..1."""
    rng = np.random.default_rng([77, SPLITS["base"], index])
    canvas, cover = ground(rng), np.zeros((SIDE, SIDE, 3), np.float32)
    size = rng.choice(list(SIZE_SHARES), p=list(SIZE_SHARES.values()))
    (low, high), spread = SIZES[size]
    scale = SIDE / scenes.SIDE
    for _ in range(2 if size == "very small" and rng.random() < 0.3 else 1):
        subject = choice(rng, tuple(sprites.pictures))
        _, sprite = sprites.draw(rng, subject, choice(rng, tuple(sprites.pictures[subject])), background="")
        if rng.random() < 0.5:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.5:
            sprite = sprite.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
        longer, centre = scale * rng.uniform(low, high), tuple(SIDE / 2 + scale * rng.uniform(-spread, spread, 2))
        pasted(canvas, sprite, longer, centre)
        pasted(cover, silhouette(sprite), longer, centre)
    light = rng.uniform(0.8, 1.15, 3) if rng.random() < 0.3 else 1.0
    image = np.clip(canvas * light + rng.normal(0, rng.uniform(0, 3), canvas.shape) + 0.5, 0, 255).astype(np.uint8)
    return image, cover[..., 0] / 255


def logits_of(model: SegformerForSemanticSegmentation, images: torch.Tensor) -> torch.Tensor:
    """Log odds (B, 64, 64) that a pixel of images (B, 3, 64, 64) in -1..1 shows a subject."""
    background_logit, subject_logit = model(pixel_values=images).logits.unbind(1)
    return F.interpolate((subject_logit - background_logit)[:, None], size=SIDE, mode="bilinear")[:, 0]


def segmenter_loss(logits: torch.Tensor, cover: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cross-entropy with the coverage as target, and the Dice loss; (B, 64, 64) each."""
    entropy = F.binary_cross_entropy_with_logits(logits, cover)
    share = logits.sigmoid()
    overlap = 2 * (share * cover).sum((1, 2)) / (share + cover).sum((1, 2)).clamp(min=1)
    return {"loss": entropy + (1 - overlap).mean(), "iou": iou(logits.detach() > 0, cover > 0.5).mean()}


def iou(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Intersection over union of masks (B, H, W), for each picture."""
    return (found & true).sum((1, 2)) / (found | true).sum((1, 2)).clamp(min=1)


@torch.no_grad()
def grade(model: SegformerForSemanticSegmentation, packs: dict[str, Sprites], count: int) -> dict[str, float]:
    """Mean IoU over `count` held-out scenes of each pack of sprites."""
    found = {}
    for name, sprites in packs.items():
        values = []
        for start in range(0, count, 64):
            images, covers = zip(*(scene(sprites, FIRST_HELD_OUT + start + i) for i in range(64)), strict=True)
            values.append(iou(logits_of(model, to_tensor(images)) > 0, torch.from_numpy(np.stack(covers)) > 0.5))
        found[name] = round(float(torch.cat(values).mean()), 4)
    return found


def export(model: SegformerForSemanticSegmentation, folder: Path) -> None:
    """The segmenter as transformers loads it, fp16, with its image processor."""
    model.half().save_pretrained(folder)
    half = [0.5] * 3
    SegformerImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half).save_pretrained(
        folder
    )
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, or continue; with `--export` write and grade what was trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--export", action="store_true", help="grade the last checkpoint and write data/segmenter")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    params = load_params("segmenter")
    torch.manual_seed(params["seed"])
    learned, recoloured, unseen = split_individuals(Sprites.load(arguments.work / "sprites"), params)
    model, folder = build(params), arguments.work / "segmenter"
    if arguments.export:
        model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
        packs = {"held-out scenes": learned, "unseen colors": recoloured, "unseen subjects": unseen}
        figures = grade(model.eval(), packs, params["graded"])
        (folder / "grade.json").write_text(json.dumps(figures, indent=1) + "\n")
        export(model, arguments.data / "segmenter")
        print(json.dumps(figures))
        return
    model = model.to(arguments.device, memory_format=torch.channels_last)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        first = step * params["batch"]
        images, covers = zip(*(scene(learned, first + i) for i in range(params["batch"])), strict=True)
        pixels = to_tensor(images).to(arguments.device, memory_format=torch.channels_last)
        return segmenter_loss(logits_of(model, pixels), torch.from_numpy(np.stack(covers)).to(arguments.device))

    fit(
        folder,
        model.train(),
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
