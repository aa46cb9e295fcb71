"""How much is learned from photos without captions, by what `prepare` does with them.

Six concepts are painted variants of subjects that the embedded base model knows by class, photographed at 256 px on
backgrounds of the world: five photos to learn from and three held out. Each is learned with the embedded defaults.
The three example concepts of the repository, without captions, can be named by --concepts. `SETTINGS` are the rows:
one caption for all photos (the recipe of the paper and of diffusers' script), several wordings of it, masks in the loss
alone, captions by hand, by the captioner, masked subjects on plain backgrounds, and all together (the default).
The figure is the share of the way: (adapter - base) / (holdout photos - base) of image alignment.

Needs the picture sources (`python -m world.sources`) and clip-retrieval (CUSTOMDIFF_CLIP_RETRIEVAL). Results are kept
in `<work>/results.jsonl`, one line per run; a run that is there already is not repeated.

    python -m benchmarks.photos_only --settings template default --seeds 42 43 44 --threads 1
    python -m benchmarks.photos_only --table
"""

import argparse
import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

from customdiff import config
from customdiff.evaluation.metrics import image_alignment, text_alignment
from customdiff.evaluation.prompts import Prompt, read_prompts
from customdiff.models.clip import Clip
from customdiff.retrieval import class_images, clip_index
from customdiff.sources import instance_images
from world.catalogue import background_phrase
from world.exhibits import SHOTS, photograph
from world.scenes import BACKGROUNDS
from world.sprites import CONCEPT_SIDE, fluent, trimmed

ROOT = Path(__file__).resolve().parent.parent

# class -> code point of the picture, and the colors that it is painted in: shadows, top, bottom
CONCEPTS = {
    "dog": ("1f415", ("#102040", "#30c8c0", "#7048d0")),
    "car": ("1f699", ("#301808", "#f0a020", "#40b060")),
    "fish": ("1f41f", ("#200820", "#f05090", "#f8e060")),
    "mushroom": ("1f344", ("#082018", "#40d080", "#3060d0")),
    "hat": ("1f3a9", ("#401010", "#f06040", "#f8f0d0")),
    "umbrella": ("2602", ("#102010", "#a0d020", "#e03030")),
}


# name here -> the example concept of the repository, which is named after its class
EXAMPLES = {"cat": "cat", "teapot": "teapot", "propeller-hat": "hat"}


def class_of(name: str) -> str:
    """The class of a concept."""
    return EXAMPLES.get(name, name)


def painted(picture: Image.Image, colors: tuple[str, str, str]) -> Image.Image:
    """An RGBA picture in other colors: its lightness leads from the shadow's color to that of its place."""
    shadow, top, bottom = (np.asarray(Image.new("RGB", (1, 1), color), np.float32)[0, 0] for color in colors)
    light = np.asarray(picture.convert("RGB").convert("L"), np.float32)[..., None] / 255
    alpha = np.asarray(picture.getchannel("A"))
    inside = light[alpha > 128]
    low, high = np.percentile(inside, (2, 98))
    light = np.clip((light - low) / max(high - low, 0.05), 0, 1)
    lower = (np.arange(picture.height) > 0.55 * picture.height)[:, None, None]
    rgb = shadow + (np.where(lower, bottom, top) - shadow) * (0.25 + 0.75 * light)
    return Image.fromarray(np.dstack([np.clip(rgb, 0, 255).astype(np.uint8), alpha]))


def places_of(name: str) -> list[str]:
    """The backgrounds of a concept's photos: five to learn from, then three held out."""
    if name in EXAMPLES:
        return [shot.background for shots in SHOTS[EXAMPLES[name]] for shot in shots]
    rng = np.random.default_rng([5, list(CONCEPTS).index(name)])
    return [str(place) for place in rng.permutation(BACKGROUNDS)[:8]]


def write_photos(work: Path) -> None:
    """photos/<class>: five photos; holdout/<class>: three, and their captions for the judge."""
    for number, (name, (code, colors)) in enumerate(CONCEPTS.items()):
        picture = painted(trimmed(fluent(ROOT / "world/build/sources", code), CONCEPT_SIDE), colors)
        places = places_of(name)
        for folder, shots, first in (("photos", SHOTS["cat"][0], 0), ("holdout", SHOTS["cat"][1], 5)):
            to = work / folder / name
            to.mkdir(parents=True, exist_ok=True)
            for i, shot in enumerate(shots):
                place = places[first + i]
                shot = type(shot)(place, shot.share, shot.centre, shot.degrees, shot.mirrored)
                photograph(picture, shot, 5000 + 100 * number + first + i).save(to / f"{i + 1:02d}.png")
                if folder == "holdout":
                    (to / f"{i + 1:02d}.txt").write_text(f"photo of a {name} {background_phrase(place)}\n")
    for name, example in EXAMPLES.items():
        for folder, source in (("photos", "concepts"), ("holdout", "holdout")):
            ignored = shutil.ignore_patterns("*.txt", "*.md")
            shutil.copytree(ROOT / "data" / source / example, work / folder / name, ignore=ignored, dirs_exist_ok=True)
        for i, shot in enumerate(SHOTS[example][1]):
            caption = f"photo of a {example} {background_phrase(shot.background)}\n"
            (work / "holdout" / name / f"{i + 1:02d}.txt").write_text(caption)


# row -> values of section `prepare`, and of `train`
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "template": ({"captions": "template", "masks": "none"}, {}),
    "wordings": ({"captions": "sidecar", "masks": "none"}, {}),
    "mask-loss": ({"captions": "template", "backgrounds": {"share": 0.0}}, {"mask_weight": 0.1}),
    "hand-written": ({"captions": "sidecar", "masks": "none"}, {}),
    "captioner": ({"captions": "auto", "masks": "none"}, {}),
    "backgrounds": ({"captions": "template", "masks": "auto"}, {}),
    "default": ({}, {}),
    "default+mask-loss": ({}, {"mask_weight": 0.3}),
    "default+place": ({"backgrounds": {"vary_place": True}}, {}),
}
WORDINGS = ("a photo of a {} {}", "a rendering of a {} {}", "the photo of my {} {}", "a close-up photo of a {} {}",
            "a bright photo of the {} {}")  # fmt: skip


def sidecars_of(name: str, setting: str) -> list[str]:
    """The captions that lie beside a concept's five photos in a setting; none in most."""
    if setting == "wordings":
        return [wording.format("{}", class_of(name)) for wording in WORDINGS]
    if setting == "hand-written":
        return [f"photo of a {{}} {class_of(name)} {background_phrase(place)}" for place in places_of(name)[:5]]
    return []


def entry_of(name: str, number: int = 1) -> dict[str, Any]:
    """A concept in params.yaml; its token is <new`number`>."""
    return {
        "source": {"path": f"photos/{name}"},
        "modifier_token": f"<new{number}>",
        "class_prompt": class_of(name),
        "instance_prompt": f"photo of a {{}} {class_of(name)}",
        "initializer_token": class_of(name),
    }


def values_of(name: str, setting: str, seed: int) -> dict[str, Any]:
    """The embedded preset for one concept in a setting: a row of `SETTINGS`, or changes such as "a.b=1,c.d=2"."""
    values = yaml.safe_load((ROOT / "customdiff/presets/embedded.yaml").read_text())
    values["base"]["seed"] = seed
    values["concepts"] = {name: entry_of(name)}
    values["train"]["validation"] = {"prompts": []}
    values["evaluate"] |= {"identity": None, "masked": False}  # the figure is image alignment
    values["tracking"] = {"enabled": False}
    if setting in SETTINGS:
        prepare, train = SETTINGS[setting]
        values["prepare"] |= prepare
        values["train"] |= train
        return values
    change(values, setting)
    return values


def change(values: dict[str, Any], changes: str) -> None:
    """Set parameters in place, given as "a.b=1,c.d=2"."""
    for each in changes.split(","):
        key, _, value = each.partition("=")
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = yaml.safe_load(value)


def set_up(work: Path) -> None:
    """Photos, links to the shipped models, and the index of the pool."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "data").mkdir(exist_ok=True)
    for part in ("base", "captioner", "clip", "identity", "judge", "pool", "prompts", "segmenter"):
        if not (work / "data" / part).exists():
            (work / "data" / part).symlink_to(ROOT / "data" / part)
    write_photos(work)
    os.chdir(work)
    if not Path("data/index").exists():
        clip_index.build_index("data/pool", "data/clip", "data/index")


def backgrounds_recognized(judge: Clip, prompts: list[Prompt], name: str, kind: str) -> float:
    """Share of a kind's images (base or customized) whose background the judge names rightly among the world's 21."""
    right = []
    for number, prompt in enumerate(prompts, 1):
        named = [place for place in BACKGROUNDS if background_phrase(place) in prompt.template]
        if not named:
            continue
        before, after = prompt.template.format(class_of(name)).split(background_phrase(named[0]))
        texts = [f"{before}{background_phrase(place)}{after}" for place in BACKGROUNDS]
        paths = sorted(Path("results/evaluate/images", kind, name).glob(f"{number:02d}-*.png"))
        scores = judge.images([Image.open(path) for path in paths]) @ judge.text(texts).T
        right += [BACKGROUNDS[best] == named[0] for best in scores.argmax(1)]
    return float(np.mean(right))


def rows_of(
    work: Path, file: str, wanted: list[dict[str, Any]], run: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows of a file of results, after the wanted runs that it does not hold yet.

    Args:
        work: absolute path of the work folder.
        wanted: for each run the arguments of `run` in order, by the keys that they have in its row.
    """
    results = work / file
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if wanted:
        set_up(work)
    for arguments in wanted:
        if any(arguments.items() <= row.items() for row in rows):
            continue
        with contextlib.redirect_stdout(open(work / "log.txt", "a")):
            rows.append(run(*arguments.values()))
        with results.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        print(*arguments.values(), "done", flush=True)
    return rows


def gather(params: config.Params, name: str) -> None:
    """The instance images of a concept, and its class images unless they are there."""
    instances, classes = Path("data/instances", name), Path("data/classes", name)
    instance_images.collect(name, params.concepts[name].source, params.download, instances)
    if not classes.exists():
        class_images.retrieve(params, name, instances=instances, index="data/index", out=classes)


def train_anew() -> None:
    """The stage `train`, without the checkpoints of earlier runs."""
    from stages import train

    shutil.rmtree(".checkpoints", ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main()


def run(name: str, setting: str, seed: int) -> dict[str, Any]:
    """Learn one concept and evaluate it, in the work folder; returns the figures."""
    from stages import evaluate, prepare

    Path("params.yaml").write_text(yaml.safe_dump(values_of(name, setting, seed), sort_keys=False))
    params = config.load()
    for path in Path("photos", name).glob("*.txt"):
        path.unlink()
    for number, caption in enumerate(sidecars_of(name, setting), 1):
        Path("photos", name, f"{number:02d}.txt").write_text(caption + "\n")
    gather(params, name)
    started = time.perf_counter()
    prepare.main(name)
    prepared = time.perf_counter() - started
    train_anew()
    evaluate.main()
    metrics = json.loads(Path("results/evaluate/metrics.json").read_text())
    judge = Clip.load(params.evaluate.clip)
    photos, holdout = (instance_images.read_instance_images(Path(part, name)) for part in ("data/instances", "holdout"))
    texts = [path.read_text().strip() for path in sorted(Path("holdout", name).glob("*.txt"))]
    images = judge.images(holdout)
    prompts = read_prompts(params.evaluate.prompts, name, params.concepts)
    return {
        "concept": name,
        "setting": setting,
        "seed": seed,
        "base": metrics["image_alignment"]["base"],
        "adapter": metrics["image_alignment"]["adapter"],
        "holdout": float(image_alignment(images, judge.images(photos)).mean()),
        "text_base": metrics["text_alignment"]["base"],
        "text_adapter": metrics["text_alignment"]["adapter"],
        "text_holdout": float(text_alignment(images, judge.text(texts)).mean()),
        "seconds_prepare": round(prepared, 1),
        "drift": metrics["drift"]["value"],
        "class_drift": metrics["class_drift"]["value"],
        "prior_kid_base": metrics["prior_kid"]["base"],
        "prior_kid": metrics["prior_kid"]["value"],
        "background_base": backgrounds_recognized(judge, prompts, name, "base"),
        "background_adapter": backgrounds_recognized(judge, prompts, name, "customized"),
    }


def way(row: dict[str, Any]) -> float:
    """Share of the way from the base model to the holdout photos, by image alignment."""
    return (row["adapter"] - row["base"]) / (row["holdout"] - row["base"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the share of the way of each concept and setting, mean over seeds, and the mean over concepts."""
    order = [*SETTINGS, *sorted({row["setting"] for row in rows} - set(SETTINGS))]
    settings = [setting for setting in order if any(row["setting"] == setting for row in rows)]
    names = [name for name in (*CONCEPTS, *EXAMPLES) if any(row["concept"] == name for row in rows)]
    lines = [f"| concept | {' | '.join(settings)} |", f"| --- | {' | '.join('---' for _ in settings)} |"]

    def cell(chosen: list[dict[str, Any]]) -> str:
        if not chosen:
            return "-"
        ways = [way(row) for row in chosen]
        text = np.mean([row["text_adapter"] / row["text_base"] - 1 for row in chosen])
        spread = f" ({min(ways):.2f} to {max(ways):.2f})" if len(ways) > 1 else ""
        return f"{np.mean(ways):.2f}{spread}; text {100 * text:+.0f} %; n={len(ways)}"

    def background_cell(chosen: list[dict[str, Any]]) -> str:
        base, adapter = (np.mean([row[f"background_{kind}"] for row in chosen]) for kind in ("base", "adapter"))
        return f"{100 * adapter / base:.0f} % ({adapter:.2f} of {base:.2f})"

    by_setting = [
        [row for row in rows if row["concept"] in CONCEPTS and row["setting"] == setting] for setting in settings
    ]
    for name in [*names, "the six painted ones"]:
        chosen = [row for row in rows if row["concept"] in ([name] if name in names else CONCEPTS)]
        cells = [cell([row for row in chosen if row["setting"] == setting]) for setting in settings]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| background recognized, of the base's rate | {' | '.join(map(background_cell, by_setting))} |")
    for figure in ("drift", "class_drift", "prior_kid"):
        means = [f"{np.mean([row[figure] for row in chosen]):.2f}" if chosen else "-" for chosen in by_setting]
        lines.append(f"| {figure.replace('_', ' ')} | {' | '.join(means)} |")
    text = [row["text_holdout"] / row["text_base"] - 1 for row in rows if row["concept"] in CONCEPTS]
    lines += ["", f"Holdout photos with their own captions: text {100 * np.mean(text):+.0f} %."]
    return "\n".join(lines)


def main() -> None:
    """Run what is not in results.jsonl yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/photos-only")
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS), choices=[*CONCEPTS, *EXAMPLES])
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["template", "default"],
        metavar="SETTING",
        help=f"{', '.join(SETTINGS)}, or changes of parameters such as train.max_steps=250,train.prior_loss_weight=1",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what was run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = [
        {"concept": name, "setting": setting, "seed": seed}
        for seed in arguments.seeds for name in arguments.concepts for setting in arguments.settings
    ]  # fmt: skip
    rows = rows_of(arguments.work.resolve(), "results.jsonl", [] if arguments.table else wanted, run)
    print(table(rows))


if __name__ == "__main__":
    main()
