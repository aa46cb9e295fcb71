"""Train the captioner: a small GIT (Wang et al. 2022) that says where the subject of a 64 x 64 image is.

Its vision encoder starts as the first layers of the base's CLIP. It is told a class and continues the caption: "photo
of a cat" -> " on the grass". Told nothing, it names the class too. Some subjects and colors are kept out, as for the
segmenter. `--export` writes data/captioner and how often it was right.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPTokenizer, CLIPVisionModel, GitConfig, GitForCausalLM, GitProcessor
from transformers.utils import logging

from world.captions import choice, thing_phrase
from world.catalogue import SUBJECTS, background_phrase, singular
from world.loop import fit, load_params, trainer_arguments
from world.scenes import CLIP_SIDE, Distribution, Scene, Sprites, compose, to_tensor
from world.train_segmenter import split_individuals

FIRST_SCENE = 60_000_000  # other scenes than the other models'
FIRST_HELD_OUT = 70_000_000  # scenes from this number on are only measured


def build(params: dict, tokenizer: CLIPTokenizer, vision: CLIPVisionModel) -> GitForCausalLM:
    """A GIT whose vision encoder is the first `params["vision_layers"]` layers of a CLIP's."""
    layers = params["vision_layers"]
    config = GitConfig(
        vision_config={
            name: getattr(vision.config, name)
            for name in ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
        }
        | {"num_hidden_layers": layers},
        vocab_size=len(tokenizer),
        hidden_size=params["width"],
        intermediate_size=4 * params["width"],
        num_hidden_layers=params["layers"],
        num_attention_heads=params["heads"],
        max_position_embeddings=2 * tokenizer.model_max_length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GitForCausalLM(config)
    ours = model.git.image_encoder.state_dict()
    theirs = {name.removeprefix("vision_model."): value for name, value in vision.state_dict().items()}
    taken = {name: theirs[name.removeprefix("vision_model.")] for name in ours if "position_ids" not in name}
    model.git.image_encoder.load_state_dict(taken, strict=False)
    return model


def distribution(sprites: Sprites) -> Distribution:
    """What photos show: mostly one subject, in any style, on any background."""
    return Distribution(
        subjects=tuple(sprites.pictures), pairs=0.08, counts=0.04, very_small=0.08, close_up=0.08, mirrored=True
    )


def target(scene: Scene, told: str | None) -> tuple[str, str]:
    """The caption in two parts, the words that name the subject and the others.

    Args:
        told: the class that the user names; the first subject's own if None.
    """
    others = "" if len(scene.subjects) == 1 else f" and {singular(scene.subjects[1])}"
    if scene.count > 1 and not others:
        thing = thing_phrase(np.random.default_rng(0), scene.subjects, scene.count, (None,))
        return f"photo of {thing}", " " + background_phrase(scene.background)
    return f"photo of {singular(told or scene.subjects[0])}", f"{others} {background_phrase(scene.background)}"


def random_class(rng: np.random.Generator) -> str:
    """A class that the image does not show: another subject's name, one or two of them, or a made-up word."""
    draw = rng.random()
    if draw < 0.4:
        return choice(rng, tuple(SUBJECTS))
    if draw < 0.7:
        return f"{choice(rng, tuple(SUBJECTS))} {choice(rng, tuple(SUBJECTS))}"
    letters = rng.integers(ord("a"), ord("z") + 1, rng.integers(3, 9))
    return "".join(map(chr, letters))


def photo(sprites: Sprites, of: Distribution, index: int, told_share: float) -> tuple[np.ndarray, str, str, bool]:
    """Scene number `index` in a photo's light: the picture, the caption in two parts, and whether the first is true."""
    scene = compose(sprites, of, "base", index)
    rng = np.random.default_rng([78, index])
    light = rng.uniform(0.85, 1.12, 3) if rng.random() < 0.3 else 1.0
    image = scene.image * light + rng.normal(0, rng.uniform(0, 3), scene.image.shape) + 0.5
    is_true = (scene.count > 1 and len(scene.subjects) == 1) or rng.random() >= told_share
    named, rest = target(scene, None if is_true else random_class(rng))
    return np.clip(image, 0, 255).astype(np.uint8), named, rest, is_true


def batch_of(photos: list, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (B, 3, 64, 64) in -1..1, token ids (B, L), and labels (B, L): -100 at padding and at words that are
    not true of the picture."""
    images, named, rest, is_true = zip(*photos, strict=True)
    ids = tokenizer([a + b for a, b in zip(named, rest, strict=True)], padding=True, return_tensors="pt").input_ids
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, first, true in zip(labels, named, is_true, strict=True):
        if not true:
            row[: len(tokenizer(first).input_ids) - 1] = -100  # without the end token
    return to_tensor(list(images), CLIP_SIDE), ids, labels


def loss_of(model: GitForCausalLM, images: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> dict:
    """Mean cross-entropy of the next token, and the share of them that are right."""
    logits = model(input_ids=ids, pixel_values=images, use_cache=False).logits[:, -ids.shape[1] : -1]
    wanted = labels[:, 1:]
    known = wanted >= 0
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    return {"loss": loss, "right": (logits.argmax(-1) == wanted)[known].float().mean()}


@torch.no_grad()
def captions(model: GitForCausalLM, images: torch.Tensor, told: list[str], tokenizer: CLIPTokenizer) -> list[str]:
    """Greedy continuations of `told`, "" for none; one image at a time, as users caption photos."""
    found = []
    for image, words in zip(images, told, strict=True):
        ids = tokenizer(words).input_ids[:-1] if words else [tokenizer.bos_token_id]
        out = model.generate(
            pixel_values=image[None], input_ids=torch.tensor([ids]), max_new_tokens=20, do_sample=False
        )
        found.append(tokenizer.decode(out[0], skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def grade(model: GitForCausalLM, packs: dict[str, Sprites], count: int, tokenizer: CLIPTokenizer) -> dict[str, dict]:
    """Shares of held-out single-subject scenes whose background and class are named rightly, for each pack."""
    grades = {}
    for name, sprites in packs.items():
        of = Distribution(subjects=tuple(sprites.pictures), pairs=0, counts=0, very_small=0, close_up=0)
        scenes = [compose(sprites, of, "held-out", FIRST_HELD_OUT + i) for i in range(count)]
        images = to_tensor([scene.image for scene in scenes], CLIP_SIDE)
        told = captions(model, images, [f"photo of {singular(scene.subjects[0])}" for scene in scenes], tokenizer)
        free = captions(model, images, [""] * count, tokenizer)
        wanted = [target(scene, None) for scene in scenes]
        grades[name] = {
            "background": float(np.mean([text == a + b for text, (a, b) in zip(told, wanted, strict=True)])),
            "background, class not told": float(
                np.mean([text.endswith(b) for text, (_, b) in zip(free, wanted, strict=True)])
            ),
            "class": float(np.mean([text.startswith(a + " ") for text, (a, _) in zip(free, wanted, strict=True)])),
        }
    return grades


def export(model: GitForCausalLM, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The captioner as transformers loads it, fp16, with its processor."""
    model.half().save_pretrained(folder)
    half, side = [0.5] * 3, CLIP_SIDE
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, image_mean=half, image_std=half
    )
    GitProcessor(images, tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, or continue; with `--export` write and grade what was trained."""
    arguments = trainer_arguments(__doc__, "captioner")
    params = load_params("captioner")
    logging.set_verbosity_error()
    torch.manual_seed(params["seed"])
    tokenizer = CLIPTokenizer.from_pretrained(arguments.clip)
    vision = CLIPVisionModel.from_pretrained(arguments.clip, dtype=torch.float32)
    model, folder = build(params, tokenizer, vision), arguments.work / "captioner"
    learned, recoloured, unseen = split_individuals(Sprites.load(arguments.work / "sprites"), params)
    if arguments.export:
        model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
        packs = {"held-out scenes": learned, "unseen colors": recoloured, "unseen subjects": unseen}
        figures = grade(model.eval(), packs, params["graded"], tokenizer)
        (folder / "grade.json").write_text(json.dumps(figures, indent=1) + "\n")
        export(model, tokenizer, arguments.data / "captioner")
        print(json.dumps(figures, indent=1))
        return
    of = distribution(learned)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        first = FIRST_SCENE + step * params["batch"]
        photos = [photo(learned, of, first + i, params["told"]) for i in range(params["batch"])]
        images, ids, labels = batch_of(photos, tokenizer)
        return loss_of(model, images.to(arguments.device), ids.to(arguments.device), labels.to(arguments.device))

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
