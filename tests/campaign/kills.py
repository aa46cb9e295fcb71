"""Kills at random points of each stage, then `dvc repro`: the outputs must be those of an undisturbed run."""

import random
import shutil
import signal
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import project
from .case import Tally

STAGES = ("download-data@cat", "retrieve-class-images@cat", "prepare@cat", "train", "evaluate")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
TARGETS = ("dvc", "stage", "both")
# Files whose appearance is a point at which a kill is worth more than at a random time, by stage.
MOMENTS = {
    "download-data@cat": ["data/instances/.cat.*"],
    "retrieve-class-images@cat": ["data/classes/.cat.*"],
    "prepare@cat": ["data/prepared/.cat.*", "data/prepared/cat"],
    "train": [
        ".checkpoints/*",
        ".checkpoints/*/.step-*",
        ".checkpoints/*/step-000006",
        ".checkpoints/*/validation/step000003*",
        ".checkpoints/*/steps.csv",
        ".checkpoints/*/complete",
        "models/.adapter.*",
        "models/adapter",
        "results/.train.*",
        "results/train/run.json",
    ],
    "evaluate": [".base-images/*", "results/.evaluate.*", "results/evaluate/metrics.json"],
}


@dataclass(frozen=True)
class Kill:
    """When, whom and how: after the file `moment` appears, or a share of the stage's time."""

    stage: str
    target: str
    number: signal.Signals
    share: float
    moment: str | None

    def __str__(self) -> str:
        when = self.moment or f"{self.share:.0%}"
        return f"{self.number.name} to {self.target} in {self.stage} at {when}"


def schedule(seed: int, count: int) -> list[Kill]:
    """A seeded schedule: stages, targets and signals in turn, random points."""
    rng = random.Random(seed)
    kills = []
    for number in range(count):
        stage = STAGES[number % len(STAGES)]
        moment = rng.choice(MOMENTS[stage]) if rng.random() < 0.5 else None
        kills.append(Kill(stage, rng.choice(TARGETS), rng.choice(SIGNALS), rng.random(), moment))
    return kills


def run_all(home: Path, seed: int, count: int, tally: Tally) -> None:
    """Run a schedule of kills; each begins with the outputs of the stages before its own."""
    ready, seconds = prepare(home)
    expected = project.digests(ready["done"])
    for kill in schedule(seed, count):
        problem = run_one(home / "killed", ready[kill.stage], kill, seconds[kill.stage], expected)
        print(f"  {kill}: {problem or 'right'}", flush=True)
        tally.add("kills", str(kill), "wrong" if problem else "right", problem)


def prepare(home: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """A project before each stage and after the last, and the seconds that each stage takes."""
    folder = project.make(home / "work")
    ready, seconds = {}, {}
    project.run(folder, *project.DVC, "repro", "index-pool")
    for stage in STAGES:
        ready[stage] = shutil.copytree(folder, home / f"before-{stage}", symlinks=True)
        started = time.monotonic()
        status, output = project.run(folder, *project.DVC, "repro", stage)
        seconds[stage] = time.monotonic() - started
        assert status == 0, output
    return ready | {"done": folder}, seconds


def run_one(folder: Path, ready: Path, kill: Kill, seconds: float, expected: dict[str, str]) -> str:
    """Kill once and run again; returns what is wrong, or nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}-tmp"), ignore_errors=True)
    output = folder.with_name(f"{folder.name}-output")
    output.unlink(missing_ok=True)
    shutil.copytree(ready, folder, symlinks=True)
    dvc = project.start(folder, *project.DVC, "repro")
    _wait(folder, dvc, kill, seconds)
    _send(dvc, kill)
    dvc.wait(120)
    first = output.read_text(errors="replace")
    status, second = project.run(folder, *project.DVC, "repro")  # at once, also where an orphan may still be writing
    problems = []
    if kill.number != signal.SIGKILL and "Traceback" in first and "/stages/" in first:
        problems.append("traceback of the killed run")
    if status != 0:
        problems.append(f"dvc repro ended with {status}: {' / '.join(second.splitlines()[-3:])}")
    else:
        found = project.digests(folder)
        problems += [f"{name} differs" for name in sorted(expected) if found.get(name) != expected[name]]
        problems += [f"{name} is new" for name in sorted(set(found) - set(expected))]
        problems += [f"{name} is left over" for name in project.leftovers(folder)]
        problems += [f"{count} MLflow runs are {state}" for state, count in _open_runs(folder, kill)]
    problems += [f"{name} still runs" for name in project.orphans(folder, 0)]
    return "; ".join(problems[:4])


def _wait(folder: Path, dvc: psutil.Popen, kill: Kill, seconds: float) -> None:
    """Wait for the moment of a kill; at most for the time that the stage takes."""
    deadline = time.monotonic() + (seconds * 1.5 if kill.moment else 0.7 + seconds * kill.share)
    while time.monotonic() < deadline and dvc.poll() is None:
        if kill.moment and any(folder.glob(kill.moment)):
            return
        time.sleep(0.002)


def _send(dvc: psutil.Popen, kill: Kill) -> None:
    try:
        parent = psutil.Process(dvc.pid)
        stages = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    targets = ([parent] if kill.target != "stage" else []) + (stages if kill.target != "dvc" else [])
    for process in targets:
        try:
            process.send_signal(kill.number)
        except psutil.NoSuchProcess:
            continue


def _open_runs(folder: Path, kill: Kill) -> list[tuple[str, int]]:
    """MLflow runs that are neither finished nor killed; a SIGKILL may leave one RUNNING."""
    database = folder / "mlflow.db"
    if not database.exists() or kill.number == signal.SIGKILL:
        return []
    with sqlite3.connect(database) as connection:
        return connection.execute(
            "select status, count(*) from runs where status not in ('FINISHED', 'KILLED') group by status"
        ).fetchall()
