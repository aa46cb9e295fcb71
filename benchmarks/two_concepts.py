"""How well two jointly trained concepts are learned, each alone and both in one image.

The concepts are those of `photos_only`, trained by the preset `embedded-two-concepts`, with the changes of a setting.
The figure is identity: in an image of both, that of the part of the image that is most like the concept's photos.

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

from benchmarks.photos_only import ROOT, change, entry_of, gather, rows_of, train_anew
from customdiff import config

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
        "text": metrics[pair]["text_alignment"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: identity of base and adapter by concept and setting, means over seeds, alone and beside another."""
    settings = sorted({row["setting"] for row in rows})
    lines = [f"| concept | {' | '.join(settings)} |", f"| --- | {' | '.join('---' for _ in settings)} |"]

    def mean(chosen: list[dict[str, Any]], where: str, name: str | None, kind: str) -> float:
        return float(
            np.mean([found[kind] for row in chosen for each, found in row[where].items() if name in (None, each)])
        )

    def cell(chosen: list[dict[str, Any]], name: str | None = None) -> str:
        if not chosen:
            return "-"
        return "; ".join(
            f"{where} {mean(chosen, where, name, 'base'):.2f}, {mean(chosen, where, name, 'adapter'):.2f}"
            for where in ("alone", "together")
        )

    for pair in [pair for pair in PAIRS if any(row["pair"] == pair for row in rows)]:
        for name in pair.split("+"):
            cells = [cell([r for r in rows if (r["pair"], r["setting"]) == (pair, each)], name) for each in settings]
            lines.append(f"| {name} ({pair}) | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(cell([r for r in rows if r['setting'] == each]) for each in settings)} |")
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
    print(table(rows_of(arguments.work.resolve(), "pairs.jsonl", [] if arguments.table else wanted, run)))


if __name__ == "__main__":
    main()
