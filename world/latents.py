"""Cache what the UNet trains on: VAE moments of composed scenes, and the text states of their captions.

`latents-<distribution>.npz`: moments (N, 8, 16, 16) fp16 (mean and log-variance, not scaled), captions (N,).
`states-<distribution>.npz`: states (C, 24, width) fp16 of the different captions,
row 0 that of the empty one, and caption (N,), each scene's row.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from world.individuals import training_pack
from world.loop import last_checkpoint, load_params
from world.scenes import DISTRIBUTIONS, Scene, compose, to_tensor
from world.train_clip import build as build_clip
from world.train_vae import build as build_vae
from world.train_vae import folders as vae_folders

FIRST_SCENE = 20_000_000  # of the base's split; the VAE and the CLIP learn from others


def load_vae(work: Path):
    """The VAE as trained so far."""
    vae = build_vae(load_params("vae"))
    checkpoint = last_checkpoint(vae_folders(work).values())
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["model"]
    vae.load_state_dict({key[4:]: value for key, value in state.items() if key.startswith("vae.")})
    return vae.eval()


def load_clip(work: Path, name: str = "clip", tuned: bool = True):
    """A CLIP as trained so far, and the tokenizer; with `tuned` the base's text tower as `train_text` has tuned it."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    clip = build_clip(load_params(name), tokenizer)
    state = torch.load(work / name / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    clip.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("clip.")})
    text = work / "text/checkpoint.pt"
    if tuned and name == "clip" and text.exists():
        state = torch.load(text, map_location="cpu", weights_only=True)["model"]
        clip.text_model.load_state_dict({key[5:]: value for key, value in state.items()})
    return clip.eval(), tokenizer


def text_model(clip) -> CLIPTextModel:
    """The CLIP's text tower as the pipeline holds it."""
    model = CLIPTextModel(clip.config.text_config)
    # transformers has moved the tower's weights in and out of a `text_model` prefix; accept both layouts
    prefixed = next(iter(model.state_dict())).startswith("text_model.")
    state = {("text_model." if prefixed else "") + key: value for key, value in clip.text_model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def text_states(model: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], batch: int = 256) -> np.ndarray:
    """Last hidden states (N, 24, width) fp16, padded as the pipeline pads, without a mask."""
    states = []
    for i in range(0, len(captions), batch):
        tokens = tokenizer(captions[i : i + batch], padding="max_length", truncation=True, return_tensors="pt")
        states.append(model(tokens.input_ids).last_hidden_state.half().numpy())
    return np.concatenate(states)


@torch.no_grad()
def encode(vae, images: list[np.ndarray]) -> np.ndarray:
    """Moments (N, 8, 16, 16) fp16 of uint8 images."""
    batch = to_tensor(images).to(memory_format=torch.channels_last)
    return vae.encode(batch).latent_dist.parameters.half().numpy()


def scaling_factor(work: Path, latents: np.ndarray | None = None) -> float:
    """What latents are multiplied by: one over their standard deviation (Rombach et al. 2022, D.1).

    Measured once, on the first latents (N, 4, 16, 16) that are cached, and kept: a UNet was trained with it.
    """
    path = work / "scaling_factor.json"
    if not path.exists():
        if latents is None:
            raise FileNotFoundError(f"{path}: not measured yet; run `python -m world.latents` first")
        path.write_text(json.dumps(1 / float(latents.astype(np.float32).std())) + "\n")
    return json.loads(path.read_text())


def cache_moments(vae, scenes_at: Callable[[int], Scene], count: int, path: Path) -> None:
    """Compose and encode `count` scenes; save moments and captions."""
    moments = np.empty((count, 8, 16, 16), np.float16)
    captions = []
    for start in tqdm(range(0, count, 64), desc="latents", mininterval=10):
        scenes = [scenes_at(i) for i in range(start, min(start + 64, count))]
        moments[start : start + len(scenes)] = encode(vae, [scene.image for scene in scenes])
        captions += [scene.caption for scene in scenes]
    save_arrays(path, moments=moments, captions=np.array(captions))
    print(json.dumps({"scenes": count, "scaling_factor": scaling_factor(path.parent, moments[:, :4])}))


def cache_states(model: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], path: Path) -> None:
    """Save the text states of the different captions, the empty one first, and which caption each scene has."""
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(["", *captions]))}
    states = text_states(model, tokenizer, list(ids))
    save_arrays(path, states=states, caption=np.array([ids[caption] for caption in captions], np.int32))


def save_arrays(path: Path, **arrays: np.ndarray | float) -> None:
    """np.savez beside the target, then rename."""
    beside = path.with_name("part-" + path.name)
    np.savez(beside, **arrays)
    os.replace(beside, path)


def main() -> None:
    """Compose, encode, cache."""
    params = load_params("latents")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--distribution", choices=list(params["scenes"]), default="curriculum")
    parser.add_argument("--scenes", type=int, default=None)
    parser.add_argument("--states-only", action="store_true", help="the text encoder alone has changed")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = arguments.work
    count = arguments.scenes or params["scenes"][arguments.distribution]
    sprites = training_pack(work, arguments.distribution)
    of = DISTRIBUTIONS[arguments.distribution](sprites)
    latents = work / f"latents-{arguments.distribution}.npz"
    if not arguments.states_only:
        vae = load_vae(work).to(memory_format=torch.channels_last)
        cache_moments(vae, lambda i: compose(sprites, of, "base", FIRST_SCENE + i), count, latents)
    clip, tokenizer = load_clip(work)
    captions = np.load(latents)["captions"].tolist()
    cache_states(text_model(clip), tokenizer, captions, work / f"states-{arguments.distribution}.npz")


if __name__ == "__main__":
    main()
