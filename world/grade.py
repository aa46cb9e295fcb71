"""Grade the world's models: the table of the model card, and a contact sheet to look at.

Real scenes come from the held-out split; generated images from captions over (subject, background) pairs that the UNet
never saw. Subjects and backgrounds are those the UNet was trained on so far, and the table says so.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from world.catalogue import COLOURS, TEXTURES, background_phrase, singular
from world.export import assemble
from world.latents import load_clip, load_vae
from world.loop import load_params
from world.scenes import (
    DISTRIBUTIONS,
    Distribution,
    Sprites,
    compose,
    contact_sheet,
    is_held_out,
    to_tensor,
    world_distribution,
)

BACKGROUNDS = (*COLOURS, *TEXTURES)


class Ear:
    """A CLIP as a grader: normalized embeddings of captions and pictures."""

    def __init__(self, work: Path, name: str) -> None:
        self.clip, self.tokenizer = load_clip(work, name)

    @torch.no_grad()
    def text(self, captions: list[str]) -> torch.Tensor:
        """Embeddings (N, D) of captions."""
        tokens = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
        return F.normalize(self.clip.text_projection(self.clip.text_model(tokens).pooler_output), dim=-1)

    @torch.no_grad()
    def image(self, images: list[np.ndarray]) -> torch.Tensor:
        """Embeddings (N, D) of uint8 pictures (64, 64, 3)."""
        parts = [
            self.clip.visual_projection(self.clip.vision_model(to_tensor(images[i : i + 128])).pooler_output)
            for i in range(0, len(images), 128)
        ]
        return F.normalize(torch.cat(parts), dim=-1)


def retrieval(ear: Ear, captions: list[str], images: list[np.ndarray]) -> dict[str, float]:
    """Share of captions whose own picture is the nearest (R@1), or among the five nearest (R@5)."""
    similarity = ear.text(captions) @ ear.image(images).T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return {"R@1": (rank < 1).float().mean().item(), "R@5": (rank < 5).float().mean().item()}


def zero_shot(
    ear: Ear, images: list[np.ndarray], facts: list[tuple[str, str]], subjects: tuple[str, ...]
) -> dict[str, float]:
    """Accuracy of naming the subject among all subjects, and the background (the subject given) among all of them."""
    seen = ear.image(images)
    names = ear.text([f"a photo of {singular(s)}" for s in subjects])
    guesses = (seen @ names.T).argmax(dim=1)
    subject = np.mean([subjects[g] == s for g, (s, _) in zip(guesses, facts, strict=True)])
    places = {s: ear.text([caption_for(s, b) for b in BACKGROUNDS]) for s in {s for s, _ in facts}}
    hits = [
        BACKGROUNDS[int((places[s] @ embedding).argmax())] == background
        for embedding, (s, background) in zip(seen, facts, strict=True)
    ]
    return {"subject": float(subject), "background": float(np.mean(hits))}


def caption_for(subject: str, background: str) -> str:
    """The plain caption of a graded picture."""
    return f"a photo of {singular(subject)} {background_phrase(background)}"


def graded_pairs(of: Distribution, count: int, seed: int) -> list[tuple[str, str]]:
    """(subject, background) pairs held out from the UNet, plain colours as often as in its training."""
    rng = np.random.default_rng([seed, 5])
    held_out = [(s, b) for s in of.subjects for b in BACKGROUNDS if is_held_out(s, b)]
    shares = {b: of.plain / len(COLOURS) for b in COLOURS} | {b: (1 - of.plain) / len(TEXTURES) for b in TEXTURES}
    weight = np.array([shares[b] for _, b in held_out])
    return [held_out[i] for i in rng.choice(len(held_out), count, p=weight / weight.sum())]


def generate(pipeline, captions: list[str], steps: int, guidance: float, batch: int = 16) -> list[np.ndarray]:
    """Pictures (64, 64, 3) uint8 of captions; caption number i starts from noise number i."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[np.ndarray] = []
    for i in tqdm(range(0, len(captions), batch), desc="generate", mininterval=10):
        part = captions[i : i + batch]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        out = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np",
            height=64, width=64,
        )  # fmt: skip
        images.extend((255 * image + 0.5).astype(np.uint8) for image in out.images)
    return images


def seconds_an_image(pipeline, steps: int, guidance: float) -> float:
    """Seconds that one picture takes, the best of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        generate(pipeline, ["a photo of a cat on the grass"], steps, guidance)
        times.append(time.perf_counter() - began)
    return min(times)


@torch.no_grad()
def vae_psnr(vae, images: list[np.ndarray]) -> float:
    """Mean PSNR in dB of reconstructed pictures, each clipped to 8 bit range."""
    x = to_tensor(images)
    out = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(64)]).clamp(-1, 1)
    return float((10 * torch.log10(4 / (out - x).square().mean(dim=(1, 2, 3)))).mean())


def grade_real(work: Path, sprites: Sprites, count: int = 1024) -> dict:
    """VAE and CLIPs on held-out scenes; naming is graded on scenes of one subject at its normal size."""
    of = world_distribution(sprites)
    scenes = [compose(sprites, of, "held-out", i) for i in range(count)]
    images = [scene.image for scene in scenes]
    figures: dict = {"vae_psnr": vae_psnr(load_vae(work), images[:256])}
    single = [s for s in scenes if s.count == 1 and s.size == "normal"][:512]
    facts = [(s.subjects[0], s.background) for s in single]
    for name in ("clip", "judge"):
        if not (work / name / "checkpoint.pt").exists():
            continue
        ear = Ear(work, name)
        named = zero_shot(ear, [s.image for s in single], facts, of.subjects)
        figures[name] = retrieval(ear, [s.caption for s in scenes], images) | named
    return figures


def grade_generated(work: Path, sprites: Sprites, params: dict, distribution: str) -> tuple[dict, list[np.ndarray]]:
    """The judge on pictures of held-out pairs, beside real scenes of the same pairs."""
    of = DISTRIBUTIONS[distribution](sprites)
    pairs = graded_pairs(of, params["captions"], seed=0)
    captions = [caption_for(*pair) for pair in pairs]
    pipeline = assemble(work)
    images = generate(pipeline, captions, params["steps"], params["guidance"])
    judge = Ear(work, "judge")
    real = real_scenes(sprites, of, pairs)
    text = judge.text(captions)

    def align(pictures: list[np.ndarray]) -> float:
        return float((text * judge.image(pictures)).sum(dim=1).mean())

    def named(pictures: list[np.ndarray]) -> dict[str, float]:
        among_trained = zero_shot(judge, pictures, pairs, of.subjects)["subject"]
        return zero_shot(judge, pictures, pairs, tuple(sprites.pictures)) | {"subject_among_trained": among_trained}

    figures = {
        "graded": len(captions),
        "generated": named(images),
        "real": named(real),
        "alignment": {"generated": align(images), "real": align(real)},
        "seconds_an_image": seconds_an_image(pipeline, params["steps"], params["guidance"]),
        "captions": captions[:64],
    }
    figures["alignment"]["ratio"] = figures["alignment"]["generated"] / figures["alignment"]["real"]
    return figures, images


def real_scenes(sprites: Sprites, of: Distribution, pairs: list[tuple[str, str]]) -> list[np.ndarray]:
    """A real scene for each pair, of the same distribution."""
    return [compose(sprites, of, "held-out", 1_000_000 + i, fixed=pair).image for i, pair in enumerate(pairs)]


def main() -> None:
    """Grade; write grade.json and samples.png."""
    params = load_params("grade")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), default="curriculum")
    parser.add_argument("--captions", type=int, default=params["captions"])
    parser.add_argument("--guidance", type=float, default=params["guidance"])
    parser.add_argument("--steps", type=int, default=params["steps"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--real-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    params |= {"captions": arguments.captions, "guidance": arguments.guidance, "steps": arguments.steps}
    sprites = Sprites.load(arguments.work / "sprites")
    figures = grade_real(arguments.work, sprites)
    if not arguments.real_only:
        more, images = grade_generated(arguments.work, sprites, params, arguments.distribution)
        figures |= more | {"sampling": {"steps": params["steps"], "guidance": params["guidance"]}}
        contact_sheet(images[:64]).save(arguments.work / "samples.png")
    (arguments.work / "grade.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "captions"}, indent=1))


if __name__ == "__main__":
    main()
