"""Speed and memory of a training run here and by diffusers' reference script, on the same model, images and options.

    python -m benchmarks.against_reference --reference PATH/TO/train_custom_diffusion.py

Each side runs in a process of its own, in turn (A B A B ...), in several rounds. See README.md for what is measured.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from benchmarks import project
from benchmarks.configs import BATCH_SIZE, CONFIGS, IMAGES_A_STEP, SEED, Config, config
from benchmarks.project import Machine, Project
from customdiff.errors import UserError, one_line_errors

WARM_UP = 10  # steps left out of the steady state
BLOCK = 10  # steps timed together on a GPU, where our loop waits for the device every tenth step (tracking.log_every)


@dataclass(frozen=True)
class Run:
    """One training run of one side.

    Attributes:
        step_seconds: seconds per step in the steady state, one figure per step (on a GPU per block of steps).
        images_per_second: at their median.
        images_per_second_overall: from the end of the warm-up to the last step, including time between steps.
        first_step_seconds: from the start of the process to the end of the first step.
        run_seconds: of the whole process.
        prepare_seconds: of our `prepare`, a process before; 0 for the reference, which encodes as it goes.
        peak_training_mb, peak_process_mb: peak memory until the last step, and until the process's end.
        losses: of each step.
    """

    step_seconds: list[float]
    images_per_second: float
    images_per_second_overall: float
    first_step_seconds: float
    run_seconds: float
    prepare_seconds: float
    peak_training_mb: float
    peak_process_mb: float
    losses: list[float]


def measured(notes: dict, started: float, run_seconds: float, prepare_seconds: float, block: int) -> Run:
    """The figures of a run from the records of its progress bar.

    Args:
        notes: as `side.Record` writes them.
        started: when the process was started, as `time.time` tells it.
        block: steps timed together.
    """
    times = notes["update_times"]
    marks = times[WARM_UP - 1 :: block]
    steps = [(after - before) / block for before, after in itertools.pairwise(marks)]
    return Run(
        step_seconds=steps,
        images_per_second=IMAGES_A_STEP / statistics.median(steps),
        images_per_second_overall=IMAGES_A_STEP * (len(marks) - 1) * block / (marks[-1] - marks[0]),
        first_step_seconds=times[0] - started,
        run_seconds=run_seconds,
        prepare_seconds=prepare_seconds,
        peak_training_mb=notes["peak_training_mb"],
        peak_process_mb=notes["peak_process_mb"],
        losses=notes["losses"],
    )


@dataclass(frozen=True)
class Ratio:
    """A figure of ours over the reference's: of the medians over rounds, and the range of the single rounds'."""

    of_medians: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.of_medians:.2f}  ({self.least:.2f} to {self.most:.2f})"


def ratio(ours: list[float], reference: list[float]) -> Ratio:
    """`ours` over `reference`, one figure a round in each."""
    rounds = [one / other for one, other in zip(ours, reference, strict=True)]
    return Ratio(statistics.median(ours) / statistics.median(reference), min(rounds), max(rounds))


# what is printed: its name, and how it comes from a run
FIGURES = {
    "images/s, median step": lambda run: run.images_per_second,
    "images/s, warm-up to last step": lambda run: run.images_per_second_overall,
    "whole run, s (ours: prepare and train)": lambda run: run.prepare_seconds + run.run_seconds,
    "whole run, s (ours: prepared before)": lambda run: run.run_seconds,
    "start to first step, s": lambda run: run.first_step_seconds,
    "peak memory while training, MB": lambda run: run.peak_training_mb,
    "peak memory of the process, MB": lambda run: run.peak_process_mb,
}


def table(ours: list[Run], reference: list[Run]) -> str:
    """The figures of both sides, medians over rounds, and their ratios; `reference` may be empty."""
    lines = [f"{'':40}{'reference':>12}{'ours':>12}   ours / reference (range over rounds)"]
    for name, of_run in FIGURES.items():
        mine, theirs = [of_run(run) for run in ours], [of_run(run) for run in reference]
        other = f"{statistics.median(theirs):12.2f}" if theirs else f"{'-':>12}"
        lines.append(f"{name:40}{other}{statistics.median(mine):12.2f}   {ratio(mine, theirs) if theirs else ''}")
    for name, part in (("first", slice(0, 50)), ("last", slice(-50, None))):
        both = [_mean_loss([loss for run in side for loss in run.losses[part]]) for side in (reference, ours)]
        lines.append(f"{f'loss, {name} 50 steps of each round':40}{both[0]:>24}{both[1]:>24}")
    return "\n".join(line.rstrip() for line in lines)


def _mean_loss(losses: list[float]) -> str:
    """Mean and its standard error."""
    if len(losses) < 2:
        return "-"
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) / len(losses) ** 0.5:.4f}"


def measure(
    work: Project, reference: Path | None, packages: str, rounds: int, workers: int
) -> tuple[list[Run], list[Run], dict]:
    """Runs of ours and of the reference, in turn, and what they ran on. Round r of both has the seed SEED + r."""
    ours, theirs, about = [], [], {}
    block = 1 if work.machine.device == "cpu" else BLOCK
    for number in range(rounds):
        seed = SEED + number
        if reference:
            notes, started, seconds = _timed(
                work, "reference", str(reference), packages, arguments=work.reference_arguments(seed, workers)
            )
            theirs.append(measured(notes, started, seconds, 0.0, block))
            about["mended"] = notes["mended"]
        work.write_params(seed)
        _, _, prepare_seconds = _timed(work, "prepare", cwd=work.ours)
        notes, started, seconds = _timed(work, "train", cwd=work.ours)
        notes["losses"] = _losses(work.ours / "results/train/steps.csv")
        ours.append(measured(notes, started, seconds, prepare_seconds, block))
        about |= {name: notes[name] for name in ("device", "threads", "versions")}
        print(f"round {number + 1} of {rounds}\n{table(ours[-1:], theirs[-1:])}", file=sys.stderr)
    return ours, theirs, about


def _timed(
    work: Project, side: str, *before: str, arguments: list[str] = (), cwd: Path | None = None
) -> tuple[dict, float, float]:
    """Run one process; returns its records, its start time and its duration in seconds."""
    out = work.folder / f"{side}.json"
    out.unlink(missing_ok=True)
    started, clock = time.time(), time.perf_counter()
    work.run(side, *before, str(out), *arguments, cwd=cwd)
    seconds = time.perf_counter() - clock
    return json.loads(out.read_text(encoding="utf-8")), started, seconds


def _losses(path: Path) -> list[float]:
    """Column `loss` of our steps.csv."""
    names, *rows = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [float(row[names.index("loss")]) for row in rows]


def main(
    reference: Annotated[
        Path | None,
        typer.Option(help="Path of diffusers' examples/custom_diffusion/train_custom_diffusion.py."),
    ] = None,
    configs: Annotated[list[str], typer.Option("--config", help=f"One or more of {', '.join(CONFIGS)}.")] = (
        "embedded",
    ),
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    precision: Annotated[
        Literal["no", "fp16", "bf16"] | None, typer.Option(help="By default no (fp32) on cpu, bf16 on cuda.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=WARM_UP + BLOCK, help="Steps per run.")] = 250,
    threads: Annotated[int, typer.Option(min=1, help="Threads per process (default: all cores).")] = os.cpu_count()
    or 1,
    workers: Annotated[int, typer.Option(min=0, help="The reference's loader processes (its default is 2).")] = 2,
    packages: Annotated[str, typer.Option(help="Folder with packages that only the reference needs.")] = "",
    work: Annotated[
        Path | None, typer.Option(help="Folder for models, images and runs, kept; by default a temporary one.")
    ] = None,
    options: Annotated[
        list[str],
        typer.Option(
            "--ours",
            metavar="KEY=VALUE",
            help="Key of params.yaml for our side only, such as train.compile=true; keep the images per step.",
        ),
    ] = (),
    out: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
) -> None:
    """Measure both sides and print their figures."""
    chosen = {name: config(name) for name in configs}
    if any(one.in_reference for one in chosen.values()):
        if reference is None:
            raise UserError("--reference: give the path of diffusers' train_custom_diffusion.py")
        if not reference.is_file():
            raise UserError(f"--reference: {reference} does not exist")
    ours_alone = dict(map(_option, options))
    machine = Machine(device, threads, precision or ("no" if device == "cpu" else "bf16"))
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, one in chosen.items():
            folder = (work or Path(temporary)) / name
            made = project.make(folder, one, machine, steps, options=ours_alone)
            script = reference.resolve() if one.in_reference else None
            extra = str(Path(packages).resolve()) if packages else ""
            ours, theirs, about = measure(made, script, extra, rounds, workers)
            about |= {"options of ours": ours_alone}
            figures[name] = _report(name, one, machine, steps, ours, theirs, about)
            if out:
                out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _option(text: str) -> tuple[str, Any]:
    """A key of params.yaml and its value from KEY=VALUE.

    Raises:
        UserError: the text has another form.
    """
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"--ours: {text!r} is not of the form KEY=VALUE, such as train.compile=true")
    return key, yaml.safe_load(value)


def _report(
    name: str, one: Config, machine: Machine, steps: int, ours: list[Run], theirs: list[Run], about: dict
) -> dict:
    """Print one configuration's figures; returns them for the JSON file."""
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    print(
        f"\n{name}: {one.resolution} px, batch {BATCH_SIZE}+{BATCH_SIZE}, {steps} steps, {len(ours)} rounds; "
        f"{about['device']}, {about['threads']} threads, precision {machine.precision}; {versions}"
    )
    for key, value in about["options of ours"].items():
        print(f"only ours: {key}: {value}")
    for change in about.get("mended", []):
        print(f"mended in the reference: {change}")
    if not one.in_reference:
        print("the reference cannot train this model")
    print(table(ours, theirs), flush=True)
    return {
        **about,
        "config": vars(one),
        "machine": vars(machine),
        "steps": steps,
        "ours": [vars(run) for run in ours],
        "reference": [vars(run) for run in theirs],
        "ratios": {
            figure: vars(ratio([of_run(run) for run in ours], [of_run(run) for run in theirs]))
            for figure, of_run in (FIGURES.items() if theirs else ())
        },
    }


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
