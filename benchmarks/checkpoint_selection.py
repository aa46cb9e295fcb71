"""Does `train.select: best` choose well? Its choice beside the last checkpoint, by prompts that it has not seen.

The concepts are those of `benchmarks.photos_only`. Each is trained for `--steps` steps with the embedded defaults and a
checkpoint every 50, all of which are graded while training. Afterwards every checkpoint is evaluated on the evaluation
prompts. Its score there is the harmonic mean of two shares: of the way from the base model to the holdout photos by
identity, and of the base model's text alignment. The difference between best and last has a 95 % interval by a paired
bootstrap over prompts.

Results are kept in `<work>/selection.jsonl`, one line per run; a run that is there already is not repeated.

    python -m benchmarks.checkpoint_selection --seeds 42 43
    python -m benchmarks.checkpoint_selection --table
"""

import argparse
import json
import shutil
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState

from benchmarks import photos_only
from customdiff import config
from customdiff.evaluation.base_image_cache import cache_folder
from customdiff.evaluation.generation import Generation, generate_pairs
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import image_alignment
from customdiff.evaluation.prompts import read_prompts
from customdiff.evaluation.scores import PromptScore, score_prompts
from customdiff.retrieval import class_images
from customdiff.sources import instance_images
from customdiff.training.selection import Grade, latest_good, shares

RESAMPLES = 2000


def values_of(name: str, seed: int, steps: int) -> dict[str, Any]:
    """The embedded preset for one concept, with a grade of every checkpoint."""
    values = photos_only.values_of(name, "default", seed)
    values["train"] |= {"max_steps": steps, "select": "best", "checkpoints_total_limit": None}
    values["evaluate"] |= {"identity": "data/identity", "num_images": 1}
    return values


def score(text: np.ndarray, identity: np.ndarray, base: tuple[float, float], ceiling: float) -> float:
    """Harmonic mean of the two shares.

    Args:
        text, identity: of each prompt.
        base: identity and text alignment of the base model.
        ceiling: identity of the holdout photos.
    """
    return harmonic_mean(shares(float(identity.mean()), float(text.mean()), base, ceiling))


def difference(first: list[PromptScore], second: list[PromptScore], ceiling: float, seed: int) -> list[float]:
    """Score of `first` minus that of `second`, with its 95 % interval: value, low, high."""
    names = ("text_alignment", "identity")
    base = np.array([[each.base[name] for name in names] for each in first])
    one, other = (np.array([[each.adapter[name] for name in names] for each in scores]) for scores in (first, second))

    def value(rows: np.ndarray) -> float:
        text, identity = base[rows].mean(axis=0)
        return score(*one[rows].T, (identity, text), ceiling) - score(*other[rows].T, (identity, text), ceiling)

    rng = np.random.default_rng(seed)
    sampled = [value(rng.integers(len(base), size=len(base))) for _ in range(RESAMPLES)]
    return [value(np.arange(len(base))), *(float(end) for end in np.quantile(sampled, [0.025, 0.975]))]


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one concept with grades, and evaluate its checkpoints; in the work folder."""
    from stages import prepare, train

    Path("params.yaml").write_text(yaml.safe_dump(values_of(name, seed, steps), sort_keys=False))
    params = config.load()
    instance_images.collect(name, params.concepts[name].source, params.download, Path("data/instances", name))
    if not Path("data/classes", name).exists():
        folder = Path("data/classes", name)
        class_images.retrieve(params, name, instances=f"data/instances/{name}", index="data/index", out=folder)
    prepare.main(name)
    shutil.rmtree(".checkpoints", ignore_errors=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main()
    trained = json.loads(Path("results/train/metrics.json").read_text())
    judges, prompts = Judges.load(params), read_prompts(params.evaluate.prompts, name, params.concepts)
    photos, holdout = (instance_images.read_instance_images(Path(part, name)) for part in ("data/instances", "holdout"))
    ceiling = float(image_alignment(judges.features(holdout), judges.features(photos)).mean())
    (folder,) = (path for path in Path(".checkpoints").iterdir() if path.is_dir())
    checkpoints = {path.name.removeprefix("step-").lstrip("0"): path for path in sorted(folder.glob("step-*"))}
    generation = Generation(params.base, params.evaluate, params.concepts, cache_folder())
    scores = {
        step: score_prompts(pairs, {name: photos}, judges)
        for step, (_, pairs) in zip(checkpoints, generate_pairs(generation, checkpoints, prompts), strict=True)
    }
    best, last = str(trained["selected_step"]), str(steps)
    figures = {
        step: {
            metric: float(np.mean([each.adapter[metric] for each in found]))
            for metric in ("identity", "text_alignment")
        }
        for step, found in scores.items()
    }
    base = tuple(float(np.mean([each.base[name] for each in scores[last]])) for name in ("identity", "text_alignment"))
    for step, found in scores.items():
        columns = [np.array([each.adapter[metric] for each in found]) for metric in ("text_alignment", "identity")]
        figures[step]["score"] = score(*columns, base, ceiling)  # type: ignore[arg-type]
    return {
        "concept": name,
        "seed": seed,
        "selected": int(best),
        "last": steps,
        "grades": trained["grades"],
        "evaluated": figures,
        "base": base,
        "ceiling": ceiling,
        "best_minus_last": difference(scores[best], scores[last], ceiling, seed),
    }


def rank_correlation(row: dict[str, Any]) -> float:
    """Spearman's correlation of the checkpoints' grades with their scores by the evaluation prompts."""
    pairs = [(grade["score"], row["evaluated"][str(grade["step"])]["score"]) for grade in row["grades"]]
    ranks = [np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True)]
    return float(np.corrcoef(*ranks)[0, 1])


def stopped_at(row: dict[str, Any], patience: int) -> int:
    """The step at which `train.patience` would have stopped the run."""
    best, since = -1.0, 0
    for grade in row["grades"]:
        best, since = (grade["score"], 0) if grade["score"] > best else (best, since + 1)
        if since >= patience:
            return grade["step"]
    return row["last"]


RULES: dict[str, tuple[float, int | None]] = {
    "highest grade (`tolerance: 0`)": (0.0, None),
    "`tolerance: 0.08`": (0.08, None),
    "the same, `patience: 3`": (0.08, 3),
    "the same, `patience: 2`": (0.08, 2),
}


def chosen(row: dict[str, Any], tolerance: float, patience: int | None) -> tuple[int, int]:
    """The step that a rule would have selected, and the last step that it would have trained."""
    last = stopped_at(row, patience) if patience else row["last"]
    best = latest_good([Grade(**grade) for grade in row["grades"] if grade["step"] <= last], tolerance)
    assert best
    return best.step, last


def rules_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each rule would have selected in the same runs, beside the last and the best checkpoint."""
    scores = [{int(step): figures["score"] for step, figures in row["evaluated"].items()} for row in rows]
    last = [of[row["last"]] for of, row in zip(scores, rows, strict=True)]
    lines = ["| rule | mean score | difference from the last, worst to best run | steps |", "| --- | --- | --- | --- |"]

    def line(rule: str, steps: list[int], trained: list[int]) -> None:
        found = [of[step] for of, step in zip(scores, steps, strict=True)]
        differences = np.subtract(found, last)
        lines.append(
            f"| {rule} | {np.mean(found):.3f} | {differences.min():+.3f} to {differences.max():+.3f} | "
            f"{np.mean(trained):.0f} |"
        )

    whole = [row["last"] for row in rows]
    line("last checkpoint", whole, whole)
    for rule, (tolerance, patience) in RULES.items():
        steps, trained = zip(*(chosen(row, tolerance, patience) for row in rows), strict=True)
        line(rule, list(steps), list(trained))
    line("the best by the evaluation prompts", [max(of, key=of.__getitem__) for of in scores], whole)
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: choice, scores and the step at which patience 2 stops, for each run."""
    lines = [
        "| concept, seed | selected step | score of it | score of the last | difference | best possible | "
        "rank correlation | patience 2 stops at |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        evaluated = {int(step): figures["score"] for step, figures in row["evaluated"].items()}
        value, low, high = row["best_minus_last"]
        most = max(evaluated, key=evaluated.__getitem__)
        lines.append(
            f"| {row['concept']}, {row['seed']} | {row['selected']} | {evaluated[row['selected']]:.3f} | "
            f"{evaluated[row['last']]:.3f} | {value:+.3f} ({low:+.3f} to {high:+.3f}) | "
            f"{evaluated[most]:.3f} at {most} | {rank_correlation(row):.2f} | {stopped_at(row, 2)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is not in selection.jsonl yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=photos_only.ROOT / "build/photos-only")
    parser.add_argument("--concepts", nargs="+", default=list(photos_only.CONCEPTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table of what was run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = [
        {"concept": name, "seed": seed, "last": arguments.steps}
        for seed in arguments.seeds for name in arguments.concepts
    ]  # fmt: skip
    work = arguments.work.resolve()
    rows = photos_only.rows_of(work, "selection.jsonl", [] if arguments.table else wanted, run)
    found = [row for row in rows if row["last"] == arguments.steps]
    print(table(found), rules_table(found), sep="\n\n")


if __name__ == "__main__":
    main()
