"""Run folders: the checkpoints of a training run, and the results it hands to the pipeline.

A run folder is not a DVC output, because DVC deletes a stage's outputs before it runs the stage. Its name is a hash of
the run's identity, so a run with other parameters, data or code never continues from its checkpoints.
"""

import csv
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.adapters.config import CONFIG_FILE
from customdiff.errors import UserError
from customdiff.files import atomic_directory
from customdiff.tracking import Tracker

RUNS = Path(".checkpoints")
COMPLETE = "complete"
RUN_ID = "run.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps done.
        seconds: time they took, over all parts of an interrupted run.
        rows: metrics of each step; see `step_log.StepLog`.
        speeds: images per second of each step.
    """

    step: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    It holds identity.json, run.json (the MLflow run), step-000100/ (an adapter and state.pt), validation/, and at the
    end adapter/, steps.csv, metrics.json, performance.json and the empty file `complete`.
    """

    path: Path

    @classmethod
    def open(cls, runs: Path, identity: dict, accelerator: Accelerator) -> "RunFolder":
        """The folder of the run with this identity. Complete runs are removed: DVC's cache has their results.

        A complete run with this identity is run again from the start.
        """
        folder = cls(runs / _name(identity))
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                for marker in runs.glob(f"*/{COMPLETE}"):
                    shutil.rmtree(marker.parent)
                folder.path.mkdir(parents=True, exist_ok=True)
                (folder.path / "identity.json").write_text(_text(identity), encoding="utf-8")
        return folder

    @classmethod
    def finished(cls, runs: Path, identity: dict) -> "RunFolder | None":
        """The complete run with this identity, where there is one."""
        folder = cls(runs / _name(identity))
        return folder if (folder.path / COMPLETE).exists() else None

    def metrics(self) -> dict:
        """Metrics, time and memory of the complete run."""
        paths = [self.path / "metrics.json", self.path / "performance.json"]
        return {key: value for path in paths for key, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return max(self.checkpoints(), default=None)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of that step.

        Raises:
            UserError: there is none; names those there are.
        """
        found = {step_of(path): path for path in self.checkpoints()}
        if step not in found:
            there = ", ".join(map(str, found)) or "none yet"
            raise UserError(f"{self.path}: has no checkpoint of step {step}; it has {there}")
        return found[step]

    def save(self, progress: Progress, learned: Adapter, optimizer, schedule, accelerator: Accelerator) -> None:
        """Write a checkpoint atomically: an adapter that can be sampled from, and the state needed to continue."""
        scaler = accelerator.scaler
        state = {
            "step": progress.step,
            "seconds": progress.seconds,
            "rows": progress.rows,
            "speeds": progress.speeds,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        with atomic_directory(self.path / f"step-{progress.step:06d}") as out:
            adapter.save(learned, out, with_pickle=False)
            torch.save(state, out / "state.pt")

    def restore(self, checkpoint: Path, optimizer, schedule, accelerator: Accelerator) -> Progress:
        """Load optimizer, schedule and scaler in place; returns how far the checkpoint's run had come."""
        state = torch.load(checkpoint / "state.pt", map_location=accelerator.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        return Progress(state["step"], state["seconds"], state["rows"], state["speeds"])

    def prune(self, limit: int | None) -> None:
        """Keep the newest `limit` checkpoints; all where None."""
        for old in self.checkpoints()[: -limit if limit else 0]:
            shutil.rmtree(old)

    def run_id(self) -> str | None:
        """The MLflow run that this training belongs to, where it was begun before."""
        path = self.path / RUN_ID
        return json.loads(path.read_text())["run_id"] if path.exists() else None

    def save_run_id(self, tracker: Tracker) -> None:
        """Record the MLflow run, so that a continued training continues it too."""
        if tracker.run_id:
            tracker.write_run_id(self.path / RUN_ID)

    def add_image(self, image: Any, name: str) -> None:
        """Keep a validation image."""
        (self.path / "validation").mkdir(exist_ok=True)
        image.save(self.path / "validation" / name)

    def finish(self, learned: Adapter, rows: list[dict], summary: dict, performance: dict) -> None:
        """Write adapter/, steps.csv, metrics.json and performance.json; then mark the run complete.

        Args:
            rows: metrics of each step.
            summary: metrics that two equal runs share.
            performance: time and memory, which differ from run to run.
        """
        with atomic_directory(self.path / "adapter") as out:
            adapter.save(learned, out)
        with open(self.path / "steps.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        for name, values in (("metrics.json", summary), ("performance.json", performance)):
            (self.path / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (self.path / COMPLETE).touch()

    def copy_results(self, models: Path, results: Path) -> None:
        """Copy the results of a complete run to models/adapter and results/train, each atomically."""
        with atomic_directory(models) as out:
            shutil.copytree(self.path / "adapter", out, dirs_exist_ok=True)
        with atomic_directory(results) as out:
            (out / "validation").mkdir()
            for name in ("steps.csv", "metrics.json", "performance.json", RUN_ID, "validation"):
                source = self.path / name
                if source.is_dir():
                    shutil.copytree(source, out / name, dirs_exist_ok=True)
                elif source.exists():
                    shutil.copy2(source, out / name)


def step_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written, by its folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def find_runs(runs: Path = RUNS) -> list[RunFolder]:
    """Runs that have a checkpoint; first the one that was begun or continued last."""
    found = [RunFolder(path) for path in runs.glob("*") if RunFolder(path).last_checkpoint()]
    return sorted(found, key=last_opened, reverse=True)


def find_run(path: Path | None = None, runs: Path = RUNS) -> RunFolder:
    """The run at `path`; None: the one below `runs` that was begun or continued last.

    Raises:
        UserError: there is no run with a checkpoint.
    """
    if path is not None and RunFolder(path).last_checkpoint():
        return RunFolder(path)
    if path is not None:
        raise UserError(f"{path}: is no run with checkpoints; `customdiff checkpoints` lists those there are")
    found = find_runs(runs)
    if not found:
        raise UserError(
            f"{runs}: holds no checkpoints; `dvc repro` trains, and train.checkpointing_steps says how often"
        )
    return found[0]


def find(name: str, runs: Path = RUNS) -> Path:
    """The checkpoint that a user names.

    Args:
        name: its folder; a run's folder, for the last one in it; or a step, or `latest`, of `find_run()`. A folder
            whose own name is a number is written as `./100`.

    Raises:
        UserError: there is no such checkpoint.
    """
    if name == "latest":
        return find_run(runs=runs).last_checkpoint()
    if name.isdecimal():
        return find_run(runs=runs).checkpoint(int(name))
    path = RunFolder(Path(name)).last_checkpoint() or Path(name)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{name}: is no checkpoint; `customdiff checkpoints` lists those there are")
    return path


def last_opened(run: RunFolder) -> float:
    """When a training last opened the folder: it writes identity.json anew each time."""
    identity = run.path / "identity.json"
    return (identity if identity.exists() else run.path).stat().st_mtime


def _text(identity: dict) -> str:
    return json.dumps(identity, indent=1, sort_keys=True)


def _name(identity: dict) -> str:
    return hashlib.sha256(_text(identity).encode()).hexdigest()[:16]
