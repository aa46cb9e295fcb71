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

A small text-to-image model of Stable Diffusion's architecture, trained from nothing by this project's own code
(`world/`) in a world that a small model can hold: named objects on named backgrounds, composed by code. It is there to
be personalized: a concept is learned, measured and compared on any laptop in minutes. It is no general image model.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("data/base")
prompt = "a photo of a penguin on a red background"
pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

## Parts

| part | what | parameters |
| --- | --- | --- |
{parts}

Pictures are {side} x {side}, latents 16 x 16 x 4, text states 24 tokens. The scheduler is Stable Diffusion's schedule
with v-prediction. The text encoder is the text tower of `data/clip`, fine-tuned so
that the words of a phrase describe that phrase alone. `data/judge` is a CLIP trained apart (other seed,
widths and scenes) and saw nothing that the base was trained on: it grades. Both CLIPs see pictures at 64 x 64. All
weights are fp16.

## What it knows

The UNet was trained on six phases of the world: {curriculum} subjects as 3D renders on {colours} plain colours and
{textures} textures, first nearly always one in a picture, then two in two pictures of five; then {subjects} subjects in
all sizes, several of them as many individuals; then the same, with more pairs and more very small ones; then still more
pairs and captions that name colours; at last more individuals, and two subjects with a colour each in one picture of
six.

- Subjects: {subject_list}.
- Many individuals each, by colour: {individuals}. Captions may name their colour: "a photo of a blue cat".
- Plain backgrounds ("on a red background"): {colour_list}.
- Textures: {texture_list}.
- Two in a picture: "a cat next to a teapot on the grass", "a photo of a fox and a car on a red background". Colours
  that a caption names are often not followed there: see the table.
- Wordings: "a photo of a cat on the grass", "photo of a cat", "a 3d render of a cat on a red background", "a cat at
  night"; and Custom Diffusion's own: "very small photo of a cat", "a far away photo of a cat", "zoomed in photo of a
  cat", "close up photo of a cat".

Both CLIPs and the VAE were trained on the whole world: {everything} subjects, also as "emoji" and "drawing", in all
sizes, two or three in a picture.

## Measured

{table}

Generated pictures were asked for by {graded} captions over (subject, background) pairs that the UNet never saw,
subjects and backgrounds drawn from what it was trained on; {steps} steps of DDIM, guidance {guidance}. In brackets:
real scenes of the held-out split, and the same scenes encoded and decoded, about the most that
generated pictures can reach.
{notes}
## Training

{training}

AdamW for vectors, Muon for matrices; min-SNR weights (gamma 5), 10 % caption dropout, EMA {ema}. Each training goes on
from its checkpoint, anywhere: raise its `minutes` in `world/params.yaml` and run it again.

## Sources

{sources}

Three individuals, {concepts}, are held out of every training and of the pool: `data/concepts`,
`data/holdout`. The scenes are composed by this project's code (Apache-2.0).
"""


def percent(share: float) -> str:
    """0.512 as "51 %"."""
    return f"{100 * share:.0f} %"


def table(figures: dict) -> str:
    """The figures of grade.json beside the goals of the second edition."""
    vae = figures["vae"]
    rows = [
        ("VAE, PSNR on held-out scenes", f"{vae['psnr']:.1f} dB", "27 dB"),
        ("VAE, gradient energy beside the original's", f"{vae['gradient_energy']:.2f}", "0.85"),
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
    """What the judge recognises in generated pictures; in brackets in real scenes, and in those after the VAE."""
    kinds = ("generated", "real", "autoencoded")
    sizes, sampling = figures["sizes"], figures["sampling"]

    def beside(of: dict[str, float]) -> str:
        generated, real, autoencoded = (percent(of[kind]) for kind in kinds)
        return f"{generated} ({real}, {autoencoded})"

    def named(what: str) -> str:
        return beside({kind: figures[kind][what] for kind in kinds})

    return [
        ("subject recognised by the judge among all subjects", named("subject"), "88 %"),
        ("the same, among the subjects that the UNet draws", named("subject_among_trained"), "-"),
        ("background recognised", named("background"), "97 %"),
        ("judge text alignment, generated over real", f"{figures['alignment_ratio']:.2f}", "-"),
        ("two subjects named, both recognised", beside(figures["company"]), "70 %"),
        ("two subjects and a colour for each: colours that are right", percent(figures["colours_right"]), "-"),
        ("subject recognised, very small", beside(sizes["very small"]), "50 %"),
        ("subject recognised, close up", beside(sizes["close up"]), "50 %"),
        ("cats of different colours, one prompt, 64 seeds", f"{figures['cats']}", "8"),
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
    sampling = figures.get("sampling", {"steps": 25, "guidance": load_params("grade")["guidance"]})
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
