"""How well two jointly trained concepts are learned, each alone and both in one image.

The concepts are those of `photos_only`, trained by the preset `embedded-two-concepts`, with the changes of a setting.
The figure is identity: in an image of both, that of the part of the image that is most like the concept's photos. What
perfect images would reach is that of holdout photos: as they are, and cut out and put side by side.

Needs the picture sources (`python -m world.sources`) and clip-retrieval (CUSTOMDIFF_CLIP_RETRIEVAL). Results are kept
in `<work>/pairs.jsonl`, one line per run; a run that is there already is not repeated.

    python -m benchmarks.two_concepts --settings prepare.together=0 prepare.together=20 --seeds 42
    python -m benchmarks.two_concepts --table
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.photos_only import ROOT, change, entry_of, gather, rows_of, train_anew
from customdiff import config
from customdiff.evaluation.judges import Judges
from customdiff.preparation import backgrounds
from customdiff.preparation.masks import subject_masks
from customdiff.preparation.together import Company, cut_out
from customdiff.sources.instance_images import instance_paths, read_instance_images

PAIRS = ("cat+teapot", "dog+umbrella", "fish+mushroom", "car+hat")


def values_of(pair: str, setting: str, seed: int) -> dict[str, Any]:
    """The preset for two concepts, with changes such as "a.b=1,c.d=2"."""
    values = yaml.safe_load((ROOT / "customdiff/presets/embedded-two-concepts.yaml").read_text())
    values["base"]["seed"] = seed
    values["concepts"] = {
        name: entry_of(name, number) | {"holdout": f"holdout/{name}"} for number, name in enumerate(pair.split("+"), 1)
    }
    values["train"]["validation"] = {"prompts": []}
    values["tracking"] = {"enabled": False}
    change(values, setting)
    return values


def side_by_side(params: config.Params, pair: str, count: int = 24) -> list[Image.Image]:
    """Images of both subjects, cut out of their holdout photos; none if no photo has a whole subject."""
    one, other = pair.split("+")
    device, side = torch.device("cpu"), params.prepare.resolution
    company = Company.of(params, one, {other: Path("holdout", other)}, device)
    paths = instance_paths(Path("holdout", one))
    found = subject_masks(paths, params.concepts[one].class_prompt, params.prepare, device)
    own = [whole for path in paths if (whole := cut_out(path, found[path].mask))]
    if company is None or not own:
        return []
    rng, colors = np.random.default_rng(0), list(backgrounds.COLORS)
    return [company.beside(own[i % len(own)], colors[i % len(colors)], side, rng)[0] for i in range(count)]


def ceilings(pair: str, seed: int) -> dict[str, float]:
    """For each concept the identity of images of both that are made of holdout photos."""
    params = config.Params.model_validate(values_of(pair, "prepare.together=20", seed))
    images, judges = side_by_side(params, pair), Judges.load(params)
    photos = {
        name: judges.embed("identity", read_instance_images(Path("data/instances", name)), name)
        for name in pair.split("+")
    }
    return {name: float(judges.align("identity", images, name, own, apart=True).mean()) for name, own in photos.items()}


def run(pair: str, setting: str, seed: int) -> dict[str, Any]:
    """Learn two concepts and evaluate them, in the work folder; returns the figures."""
    from stages import evaluate, prepare

    Path("params.yaml").write_text(yaml.safe_dump(values_of(pair, setting, seed), sort_keys=False))
    params = config.load()
    for name in params.concepts:
        gather(params, name)
    for name in params.concepts:
        prepare.main(name)
    train_anew()
    evaluate.main()
    metrics = json.loads(Path("results/evaluate/metrics.json").read_text())["concepts"]
    return {
        "pair": pair,
        "setting": setting,
        "seed": seed,
        "alone": {name: metrics[name]["identity"] for name in params.concepts},
        "holdout": {name: metrics[name]["holdout"]["identity"] for name in params.concepts},
        "together": {name: found["identity"] for name, found in metrics[pair]["each"].items()},
        "side_by_side": ceilings(pair, seed),
        "text": metrics[pair]["text_alignment"],
    }


def table(rows: list[dict[str, Any]], where: str, ceiling: str) -> str:
    """Markdown: identity of photos, base model and the adapter of each setting, by concept, means over seeds.

    Args:
        where: "alone" or "together".
        ceiling: key of a row that has the figures of photos.
    """
    cells: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: (PAIRS.index(row["pair"]), row["setting"])):
        for name, found in row[where].items():
            values = {
                "holdout photos": row[ceiling][name],
                "base model": found["base"],
                row["setting"]: found["adapter"],
            }
            for column, value in values.items():
                for line in (f"{name} ({row['pair']})", "mean"):
                    cells.setdefault(line, {}).setdefault(column, []).append(value)
    cells["mean"] = cells.pop("mean")  # last
    columns = list(cells["mean"])
    lines = [f"| {where} | {' | '.join(columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for line, found in cells.items():
        means = [f"{np.mean(found[column]):.2f}" if column in found else "" for column in columns]
        lines.append(f"| {line} | {' | '.join(means)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not in pairs.jsonl yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/two-concepts")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["prepare.together=0", "prepare.together=20"],
        metavar="SETTING",
        help="changes of parameters, such as prepare.together=0,train.max_steps=400",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what was run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = [
        {"pair": pair, "setting": setting, "seed": seed}
        for seed in arguments.seeds for pair in arguments.pairs for setting in arguments.settings
    ]  # fmt: skip
    rows = rows_of(arguments.work.resolve(), "pairs.jsonl", [] if arguments.table else wanted, run)
    print(table(rows, "alone", "holdout"), table(rows, "together", "side_by_side"), sep="\n\n")


if __name__ == "__main__":
    main()
