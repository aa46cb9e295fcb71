"""The model card: what the base is, what it was made of, what was measured."""

import json
from pathlib import Path

from world.catalogue import COLOURS, CONCEPTS, CURRICULUM, INDIVIDUALS, TEXTURES, VARIED
from world.loop import load_params
from world.sources import SOURCES

TEMPLATE = """---
license: other
library_name: diffusers
pipeline_tag: text-to-image
---

# The embedded base model

A small text-to-image model with the architecture of Stable Diffusion, trained from scratch by this project (`world/`)
on composed scenes: named objects on named backgrounds. It exists to be personalized: concepts can be learned, measured
and compared in minutes on any laptop. It is not a general image model.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("data/base")
prompt = "a photo of a penguin on a red background"
pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}, eta={eta}).images[0]
```

## Components

| component | class | parameters |
| --- | --- | --- |
{parts}

Images are {side} x {side} px, latents 16 x 16 x 4, and text states 24 tokens long. The scheduler has Stable Diffusion's
noise schedule and predicts v. The text encoder is the text tower of `data/clip`, fine-tuned so that the words of a
phrase describe that phrase alone. `data/judge` is the CLIP that evaluates. It was trained separately (other seed, sizes
and scenes) and has seen nothing that the base model was trained on. Both CLIP models see images at 64 x 64 px. All
weights are fp16.

## What it can draw

The UNet was trained in six phases. It began with {curriculum} subjects as 3D renders on {colours} plain colors and
{textures} textures, nearly always one to an image, then two in two of five images. Then came {subjects} subjects in all
sizes, some of them as many individuals; more pairs and more very small subjects; more pairs, and captions that name
colors; and finally more individuals, and two subjects with a color each in one image of six.

- Subjects: {subject_list}.
- Subjects with many individuals, which differ in color: {individuals}. Captions may name the color: "a photo of a blue
  cat".
- Plain backgrounds ("on a red background"): {colour_list}.
- Textures: {texture_list}.
- Two in an image: "a cat next to a teapot on the grass", "a photo of a fox and a car on a red background". Colors that
  such a caption names are often not followed: see the table.
- Wordings: "a photo of a cat on the grass", "photo of a cat", "a 3d render of a cat on a red background", "a cat at
  night"; and those of Custom Diffusion's augmentation: "very small photo of a cat", "a far away photo of a cat",
  "zoomed in photo of a cat", "close up photo of a cat".

Both CLIP models and the VAE were trained on {everything} subjects, also as "emoji" and "drawing", in all sizes, with up
to three in an image.

## Evaluation

{table}

Images were generated for {graded} captions of (subject, background) pairs that the UNet was not trained on, with
{steps} steps of DDIM, eta {eta}, guidance scale {guidance}. In brackets: held-out real scenes, and the same scenes
encoded and decoded by the VAE, which is about the most that generated images can reach.
{notes}
## Training

{training}

AdamW for vectors, Muon for matrices; min-SNR weights (gamma 5), 10 % caption dropout, EMA {ema}. To continue a training
from its checkpoint on any machine, raise its `minutes` in `world/params.yaml` and run it again.

## Sources

{sources}

Three individuals, {concepts}, are excluded from every training and from the pool: `data/concepts`, `data/holdout`. The
scenes are composed by this project's code (Apache-2.0).
"""


def percent(share: float) -> str:
    """0.512 as "51 %"."""
    return f"{100 * share:.0f} %"


def table(figures: dict) -> str:
    """The figures of grade.json beside the goals of the second edition."""
    vae = figures["vae"]
    rows = [
        ("VAE, PSNR on held-out scenes", f"{vae['psnr']:.1f} dB", "27 dB"),
        ("VAE, gradient energy relative to the original", f"{vae['gradient_energy']:.2f}", "0.85"),
    ]
    for name in ("clip", "judge"):
        if name in figures:
            rows += clip_rows(name, figures[name])
    if "generated" in figures:
        rows += generated_rows(figures)
    lines = ["| figure | measured | goal |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {figure} | {measured} | {goal} |" for figure, measured, goal in rows])


def clip_rows(name: str, found: dict) -> list[tuple[str, str, str]]:
    """How well a CLIP reads real scenes."""
    return [
        (f"{name}, caption retrieval among 1024, R@1 / R@5", f"{percent(found['R@1'])} / {percent(found['R@5'])}", "-"),
        (
            f"{name}, subject / background of real scenes, zero-shot",
            f"{percent(found['subject'])} / {percent(found['background'])}",
            "-",
        ),
    ]


def generated_rows(figures: dict) -> list[tuple[str, str, str]]:
    """What the judge recognizes in generated images; in brackets in real scenes, and in those after the VAE."""
    kinds = ("generated", "real", "autoencoded")
    sizes, sampling = figures["sizes"], figures["sampling"]

    def beside(of: dict[str, float]) -> str:
        generated, real, autoencoded = (percent(of[kind]) for kind in kinds)
        return f"{generated} ({real}, {autoencoded})"

    def named(what: str) -> str:
        return beside({kind: figures[kind][what] for kind in kinds})

    return [
        ("subject recognized by the judge among all subjects", named("subject"), "88 %"),
        ("the same, among the subjects that the UNet can draw", named("subject_among_trained"), "-"),
        ("background recognized", named("background"), "97 %"),
        ("judge text alignment, generated over real", f"{figures['alignment_ratio']:.2f}", "-"),
        ("two subjects, both recognized", beside(figures["company"]), "70 %"),
        ("two subjects with a color each, colors that are right", percent(figures["colours_right"]), "-"),
        ("subject recognized, very small", beside(sizes["very small"]), "50 %"),
        ("subject recognized, close up", beside(sizes["close up"]), "50 %"),
        ("cats of different colors, one prompt, 64 seeds", f"{figures['cats']}", "8"),
        (
            f"one image, {sampling['steps']} steps with guidance, threads: {figures['threads']}",
            f"{figures['seconds_an_image']:.2f} s",
            "1.3 s on 2 cores",
        ),
    ]


def training_table() -> str:
    """Steps, batch, minutes and machine of each training, from history.json."""
    rows = json.loads((Path(__file__).parent / "history.json").read_text())
    lines = ["| training | steps | batch | minutes | on |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(lines + [f"| {name} | {' | '.join(map(str, row.values()))} |" for name, row in rows.items()])


def card(work: Path, pipeline, everything: int) -> str:
    """The card's text, of what was measured last."""
    figures = json.loads((work / "grade.json").read_text())
    sampling = {name: load_params("grade")[name] for name in ("steps", "guidance", "eta")} | figures.get("sampling", {})
    names = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "vae": "AutoencoderKL"}
    parts = [
        f"| {part} | {kind} | {sum(p.numel() for p in getattr(pipeline, part).parameters()) / 1e6:.2f} M |"
        for part, kind in names.items()
    ]
    return TEMPLATE.format(
        **sampling,
        parts="\n".join(parts),
        side=pipeline.vae.config.sample_size,
        curriculum=len(CURRICULUM),
        subjects=len(VARIED),
        colours=len(COLOURS),
        textures=len(TEXTURES),
        subject_list=", ".join(VARIED),
        individuals=", ".join(INDIVIDUALS),
        concepts=" and ".join(", ".join(f"a {name}" for name in CONCEPTS).rsplit(", ", 1)),
        colour_list=", ".join(COLOURS),
        texture_list=", ".join(f'"{phrase}"' for phrase in TEXTURES.values()),
        everything=everything,
        table=table(figures),
        graded=figures.get("graded", 0),
        notes=figures.get("notes", ""),
        training=training_table(),
        ema=load_params("unet")["ema"],
        sources="\n".join(f"- {s.credit}: {s.name}, {s.licence}." for s in SOURCES),
    )
