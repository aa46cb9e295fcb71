"""Train a CLIP on scenes and captions: the base's (`--name clip`) or the judge's (`--name judge`)."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from world.catalogue import INDIVIDUALS
from world.individuals import with_colours, with_individuals
from world.loop import fit, load_params
from world.scenes import (
    BACKGROUNDS,
    CLIP_SIDE,
    SIZES,
    Distribution,
    Scene,
    Sprites,
    compose,
    detailed_distribution,
    to_tensor,
    world_distribution,
)


def build(params: dict, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIPModel for this tokenizer and 64 x 64 pictures."""
    text, vision = params["text"], params["vision"]
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": tokenizer.model_max_length,
            "projection_dim": params["projection"],
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "image_size": CLIP_SIDE,
            "patch_size": vision["patch"],
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "projection_dim": params["projection"],
        },
        projection_dim=params["projection"],
    )
    return CLIPModel(config)


SIZE_NAMES = tuple(SIZES)


def fact_targets(scenes: list[Scene], subjects: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What scenes show, for the linear probe: a share of each subject (B, S), and (B,) indices of the rest."""
    shares = torch.zeros(len(scenes), len(subjects))
    for row, scene in zip(shares, scenes, strict=True):
        for subject in scene.subjects:
            row[subjects.index(subject)] = 1 / len(scene.subjects)
    indices = {
        "background": [BACKGROUNDS.index(scene.background) for scene in scenes],
        "size": [SIZE_NAMES.index(scene.size) for scene in scenes],
        "count": [scene.count - 1 for scene in scenes],
    }
    return {"subject": shares} | {name: torch.tensor(values) for name, values in indices.items()}


def soften(images: torch.Tensor, share: float) -> torch.Tensor:
    """Images (B, 3, S, S), the first `share` of them without their finest detail, as an autoencoder returns them."""
    count, side = round(share * len(images)), images.shape[-1]
    if not count:
        return images
    coarse = F.adaptive_avg_pool2d(images[:count], int(torch.randint(side // 2, side, ())))
    return torch.cat([F.interpolate(coarse, side, mode="bilinear"), images[count:]])


def pack_and_distribution(work: Path, name: str, individuals: int) -> tuple[Sprites, Distribution]:
    """What a CLIP's scenes are made of.

    The judge's hold many individuals of every subject: a judge that has seen cats of one colour alone takes the colour
    for the class, and counts a well-learned cat of another colour as a failure.

    Args:
        individuals: made of each picture, at least.
    """
    sprites = Sprites.load(work / "sprites")
    if name != "judge":
        return sprites, world_distribution(sprites)
    counts = {subject: max(individuals, INDIVIDUALS.get(subject, 0)) for subject in sprites.pictures}
    return with_colours(with_individuals(sprites, counts)), detailed_distribution(sprites)


class Learner(nn.Module):
    """A CLIP, and while it learns a linear probe that reads a scene's facts out of either tower's embedding.

    The probe is shared by both towers, which pulls them together; it names the subject directly, where contrast alone
    finds it late: scenes are told apart by their backgrounds first. It is not part of what ships.
    """

    def __init__(self, clip: CLIPModel, subjects: tuple[str, ...], softened: float = 0.0) -> None:
        super().__init__()
        self.clip = clip
        self.subjects = subjects
        self.softened = softened  # share of the images that lose their finest detail
        sizes = {"subject": len(subjects), "background": len(BACKGROUNDS), "size": len(SIZES), "count": 3}
        width = clip.config.projection_dim
        self.probe = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, tokens: torch.Tensor, scenes: list[Scene]) -> dict[str, torch.Tensor]:
        """The symmetric contrastive loss (Radford et al. 2021) and the probe's; tokens (B, L)."""
        clip, device = self.clip, tokens.device
        images = soften(to_tensor([scene.image for scene in scenes], CLIP_SIDE).to(device), self.softened)
        text = F.normalize(clip.text_projection(clip.text_model(tokens).pooler_output), dim=-1)
        image = F.normalize(clip.visual_projection(clip.vision_model(images).pooler_output), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=100) * text @ image.T
        target = torch.arange(len(logits), device=device)
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        facts = {name: value.to(device) for name, value in fact_targets(scenes, self.subjects).items()}
        read = {
            name: sum(F.cross_entropy(head(10 * tower), facts[name]) for tower in (text, image)) / 2
            for name, head in self.probe.items()
        }
        named = self.probe["subject"](10 * image).argmax(dim=1) == facts["subject"].argmax(dim=1)
        return {
            "loss": contrast + 0.5 * sum(read.values()),
            "contrast": contrast.detach(),
            "top1": (logits.argmax(dim=1) == target).float().mean(),
            "named": named.float().mean(),
        }


def few_backgrounds(of: Distribution, step: int, count: int) -> Distribution:
    """The distribution on `count` backgrounds alone: batches in which only the subjects tell the scenes apart.

    Over all backgrounds, a batch is soon sorted by background, and subjects are learned late.
    """
    rng = np.random.default_rng([step, 99])
    return replace(of, backgrounds=tuple(BACKGROUNDS[i] for i in rng.choice(len(BACKGROUNDS), count, replace=False)))


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=["clip", "judge"], required=True)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--restart", action="store_true")
    parser.add_argument("--freeze-text", action="store_true", help="a UNet was trained on the text tower as it is")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    params = load_params(arguments.name)
    torch.manual_seed(params["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(arguments.work / "tokenizer")
    sprites, of = pack_and_distribution(arguments.work, arguments.name, params.get("individuals", 0))
    learner = Learner(build(params, tokenizer), of.subjects, params.get("softened", 0.0)).to(arguments.device)
    if arguments.freeze_text:
        learner.clip.text_model.requires_grad_(False)
        learner.clip.text_projection.requires_grad_(False)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        first = step * params["batch"]
        few = few_backgrounds(of, step, params["backgrounds"])
        scenes = [compose(sprites, few, params["split"], first + i) for i in range(params["batch"])]
        # padded to the longest of the batch: the model is causal, what follows the end token changes nothing
        tokens = tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt").input_ids
        return learner(tokens.to(arguments.device), scenes)

    fit(
        arguments.work / arguments.name,
        learner,
        loss_at,
        minutes=arguments.minutes or params["minutes"],
        peak_lr=params["peak_lr"],
        muon=params["muon"],
        weight_decay=params["weight_decay"],
        warmup=50,
        seed=params["seed"],
        device=arguments.device,
        restart=arguments.restart,
    )


if __name__ == "__main__":
    main()
