"""Grade the world's models: the table of the model card, and contact sheets to look at.

Real scenes come from the held-out split; generated images from captions over (subject, background) pairs that the UNet
never saw. By default the models of the work folder are graded; `--base data/base` grades a pipeline folder by the same
code, for a comparison.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from world.captions import named
from world.catalogue import COLOURS, TEXTURES
from world.export import assemble
from world.graders import (
    ClipEmbedder,
    autoencoded,
    both_recognised,
    caption_for,
    colours_right,
    company_caption,
    distinct_colours,
    retrieval,
    subject_colours,
    vae_figures,
    zero_shot,
)
from world.individuals import training_pack
from world.loop import load_params
from world.scenes import (
    BACKGROUNDS,
    DISTRIBUTIONS,
    SIDE,
    Distribution,
    Sprites,
    compose,
    contact_sheet,
    is_held_out,
    world_distribution,
)

HUES = ("red", "yellow", "green", "blue", "purple")  # colours that are told apart by their hue alone
SIZES = {"very small": "a far away photo", "close up": "a close up photo"}


def graded_pairs(of: Distribution, count: int, seed: int) -> list[tuple[str, str]]:
    """(subject, background) pairs held out from the UNet, plain colours as often as in its training."""
    rng = np.random.default_rng([seed, 5])
    held_out = [(s, b) for s in of.subjects for b in BACKGROUNDS if is_held_out(s, b)]
    shares = {b: of.plain / len(COLOURS) for b in COLOURS} | {b: (1 - of.plain) / len(TEXTURES) for b in TEXTURES}
    weight = np.array([shares[b] for _, b in held_out])
    return [held_out[i] for i in rng.choice(len(held_out), count, p=weight / weight.sum())]


def graded_company(of: Distribution, count: int, seed: int) -> list[tuple[str, str, str]]:
    """(left subject, right subject, background) of images of two, the left one's background held out from it."""
    rng = np.random.default_rng([seed, 6])
    pairs = graded_pairs(of, count, seed + 1)
    return [(one, str(rng.choice([s for s in of.subjects if s != one])), background) for one, background in pairs]


def image_side(pipeline: StableDiffusionPipeline) -> int:
    """The side of the images that a pipeline makes."""
    return pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def generate(pipeline, captions: list[str], params: dict, batch: int = 16) -> list[np.ndarray]:
    """Images (side, side, 3) uint8 of captions; caption number i starts from noise number i.

    Args:
        params: of section `grade`; `steps`, `guidance` and `eta` are used.
    """
    pipeline.set_progress_bar_config(disable=True)
    side = image_side(pipeline)
    images: list[np.ndarray] = []
    for i in tqdm(range(0, len(captions), batch), desc="generate", mininterval=10):
        part = captions[i : i + batch]
        generators = [torch.Generator().manual_seed(i + j) for j in range(len(part))]
        out = pipeline(
            part, num_inference_steps=params["steps"], guidance_scale=params["guidance"], eta=params["eta"],
            generator=generators, output_type="np", height=side, width=side,
        )  # fmt: skip
        images.extend((255 * image + 0.5).astype(np.uint8) for image in out.images)
    return images


def seconds_an_image(pipeline, params: dict) -> float:
    """Seconds that one image takes, the best of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        generate(pipeline, ["a photo of a cat on the grass"], params)
        times.append(time.perf_counter() - began)
    return min(times)


def grade_real(vae, side: int, clips: dict[str, ClipEmbedder], sprites: Sprites, count: int = 1024) -> dict:
    """VAE and CLIPs on held-out scenes; naming is graded on scenes of one subject at its normal size."""
    of = world_distribution(sprites)
    scenes = [compose(sprites, of, "held-out", i) for i in range(count)]
    images = [scene.image for scene in scenes]
    figures: dict = {"vae": vae_figures(vae, images[:256], side)}
    single = [s for s in scenes if s.count == 1 and s.size == "normal"][:512]
    facts = [(s.subjects[0], s.background) for s in single]
    for name, clip in clips.items():
        named = zero_shot(clip, [s.image for s in single], facts, of.subjects)
        figures[name] = retrieval(clip, [s.caption for s in scenes], images) | named
    return figures


def grade_pairs(
    pipeline, judge: ClipEmbedder, sprites: Sprites, of: Distribution, params: dict
) -> tuple[dict, list, list]:
    """The judge on images of one subject each, of held-out pairs, beside real scenes of the same pairs."""
    pairs = graded_pairs(of, params["captions"], seed=0)
    captions = [caption_for(*pair) for pair in pairs]
    images = generate(pipeline, captions, params)
    real = [compose(sprites, of, "held-out", 1_000_000 + i, fixed=pair).image for i, pair in enumerate(pairs)]
    text = judge.text(captions)

    def figures(pictures: list[np.ndarray]) -> dict[str, float]:
        named = zero_shot(judge, pictures, pairs, tuple(sprites.pictures))
        among_trained = zero_shot(judge, pictures, pairs, of.subjects)["subject"]
        alignment = float((text * judge.image(pictures)).sum(dim=1).mean())
        return named | {"subject_among_trained": among_trained, "alignment": alignment}

    found = {"generated": images, "real": real, "autoencoded": autoencoded(pipeline.vae, real)}
    return {"graded": len(captions)} | {name: figures(pictures) for name, pictures in found.items()}, images, captions


def grade_sizes(pipeline, judge: ClipEmbedder, sprites: Sprites, of: Distribution, params: dict) -> tuple[dict, list]:
    """Very small and close up: the subject named among all, in a caption that says the size, beside real scenes."""
    found, shown = {}, []
    for number, (size, kind) in enumerate(SIZES.items()):
        pairs = graded_pairs(of, params["sizes"], seed=20 + number)
        captions = [caption_for(*pair, kind) for pair in pairs]
        images = generate(pipeline, captions, params)
        sized = replace(of, normal=size)
        real = [compose(sprites, sized, "held-out", 3_000_000 + i, fixed=pair).image for i, pair in enumerate(pairs)]
        found[size] = {
            name: zero_shot(judge, pictures, pairs, tuple(sprites.pictures), kind)["subject"]
            for name, pictures in {
                "generated": images, "real": real, "autoencoded": autoencoded(pipeline.vae, real)
            }.items()
        }  # fmt: skip
        shown += images[:16]
    return found, shown


def grade_company(pipeline, judge: ClipEmbedder, sprites: Sprites, of: Distribution, params: dict) -> tuple[dict, list]:
    """Two subjects in one prompt: both named, beside real scenes of two."""
    facts = graded_company(of, params["company"], seed=0)
    images = generate(pipeline, [company_caption(*fact) for fact in facts], params)
    everything = tuple(sprites.pictures)
    scenes = (compose(sprites, of, "held-out", 2_000_000 + i) for i in range(10_000))
    real = [scene for scene, _ in zip((s for s in scenes if len(s.subjects) == 2), facts, strict=False)]
    real_facts = [(*scene.subjects, scene.background) for scene in real]
    pictures = [scene.image for scene in real]
    return {
        "generated": both_recognised(judge, images, facts, everything),
        "real": both_recognised(judge, pictures, real_facts, everything),
        "autoencoded": both_recognised(judge, autoencoded(pipeline.vae, pictures), real_facts, everything),
    }, images


def coloured_pairs(sprites: Sprites, count: int) -> list[list[tuple[str, str]]]:
    """Pairs of (subject, colour) of individuals that there are, in two colours that their hue tells apart."""
    rng = np.random.default_rng([0, 7])
    known = sorted({(subject, colour) for (subject, _), colour in sprites.colours.items() if colour in HUES})
    found: list[list[tuple[str, str]]] = []
    while len(found) < count:
        one, other = (known[i] for i in rng.choice(len(known), 2, replace=False))
        if one[0] != other[0] and one[1] != other[1]:
            found.append([one, other])
    return found


def grade_colours(pipeline, sprites: Sprites, params: dict) -> tuple[float, list]:
    """Images of two subjects with a colour each: how many subjects have the colour that was said of them."""
    pairs = coloured_pairs(sprites, params["company"])
    things = [[named(*thing) for thing in pair] for pair in pairs]
    captions = [f"a photo of {one} next to {other} on a white background" for one, other in things]
    images = generate(pipeline, captions, params)
    return colours_right(images, [(one[1], other[1]) for one, other in pairs]), images


def grade_individuals(pipeline, params: dict) -> tuple[int, list]:
    """How many cats of different colours one prompt gives."""
    images = generate(pipeline, ["a photo of a cat on a white background"] * 64, params)
    return distinct_colours(subject_colours(images)), images


def grade_generated(
    pipeline, judge: ClipEmbedder, sprites: Sprites, params: dict, distribution: str
) -> tuple[dict, dict[str, list[np.ndarray]]]:
    """Everything that is graded of generated images; sheets of them by name."""
    of = DISTRIBUTIONS[distribution](sprites)
    figures, pairs, captions = grade_pairs(pipeline, judge, sprites, of, params)
    figures["alignment_ratio"] = figures["generated"]["alignment"] / figures["real"]["alignment"]
    figures["sizes"], sizes = grade_sizes(pipeline, judge, sprites, of, params)
    figures["company"], company = grade_company(pipeline, judge, sprites, of, params)
    figures["colours_right"], bound = grade_colours(pipeline, sprites, params)
    figures["cats"], cats = grade_individuals(pipeline, params)
    figures["seconds_an_image"] = seconds_an_image(pipeline, params)
    figures["threads"] = torch.get_num_threads()
    figures["captions"] = captions[:64]
    sheets = {"samples": pairs[:64], "sizes": sizes, "company": company[:32], "colours": bound[:32], "cats": cats}
    return figures, sheets


def main() -> None:
    """Grade; write grade.json and sheets of the images."""
    params = load_params("grade")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument(
        "--base", type=Path, default=None, help="Pipeline folder to grade (default: the work folder's)."
    )
    parser.add_argument(
        "--judge", type=Path, default=None, help="CLIP folder that grades (default: the work folder's)."
    )
    parser.add_argument("--out", type=Path, default=None, help="Folder of the results (default: the work folder).")
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), default="varied")
    parser.add_argument("--captions", type=int, default=params["captions"])
    parser.add_argument("--guidance", type=float, default=params["guidance"])
    parser.add_argument("--steps", type=int, default=params["steps"])
    parser.add_argument("--eta", type=float, default=params["eta"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--real-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sampling = {"steps": arguments.steps, "guidance": arguments.guidance, "eta": arguments.eta}
    params |= sampling | {"captions": arguments.captions}
    out = arguments.out or arguments.work
    out.mkdir(parents=True, exist_ok=True)
    base = arguments.base
    pipeline = (
        StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32) if base else assemble(arguments.work)
    )
    if arguments.judge:
        clips = {"judge": ClipEmbedder.shipped(arguments.judge)}
    else:
        clips = {name: ClipEmbedder.trained(arguments.work, name) for name in ("clip", "judge")}
    plain = Sprites.load(arguments.work / "sprites")
    figures = grade_real(pipeline.vae, min(SIDE, image_side(pipeline)), clips, plain)
    if not arguments.real_only:
        sprites = training_pack(arguments.work, arguments.distribution)
        more, sheets = grade_generated(pipeline, clips["judge"], sprites, params, arguments.distribution)
        figures |= more | {"sampling": sampling}
        for name, images in sheets.items():
            contact_sheet(images, columns=8).save(out / f"{name}.png")
    figures["distribution"] = arguments.distribution
    (out / "grade.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({k: v for k, v in figures.items() if k != "captions"}, indent=1))


if __name__ == "__main__":
    main()
