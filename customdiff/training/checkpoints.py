"""Run folders: checkpoints and results of a training run.

A run folder is not a DVC output, because DVC deletes a stage's outputs before it runs the stage. Its name is a hash of
the run's identity, so a run with other parameters, data or code never continues from its checkpoints.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from customdiff.adapters import adapter
from customdiff.adapters.adapter import Adapter
from customdiff.adapters.config import CONFIG_FILE
from customdiff.config import Params, Train
from customdiff.errors import UserError
from customdiff.files import atomic_directory, atomic_file
from customdiff.tracking import Tracker, add_adapter

RUNS = Path(".checkpoints")
COMPLETE = "complete"
RUN_ID = "run.json"
GRADE = "grade.json"


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: completed steps.
        seconds: training time, including that before an interruption.
        rows: metrics of each step; see `step_log.StepLog`.
        speeds: images per second of each step.
        measured: figures of the graded checkpoints; see `selection.Selection`.
    """

    step: int = 0
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    measured: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    It contains identity.json, run.json (the MLflow run), step-000100/ (an adapter and state.pt) and validation/. A
    complete run also has adapter/, steps.csv, metrics.json, performance.json and the file `complete`.
    """

    path: Path

    @classmethod
    def of(cls, runs: Path, identity: dict) -> "RunFolder":
        """The folder, which may not exist yet, of the run with this identity."""
        return cls(runs / _name(identity))

    def open(self, identity: dict, train: Train, accelerator: Accelerator) -> None:
        """Create the folder, and remove complete runs, whose results are in DVC's cache.

        The run itself is kept if it is complete, because it would end with the same results.
        """
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                for marker in self.path.parent.glob(f"*/{COMPLETE}"):
                    if marker.parent != self.path or not self.is_complete(train):
                        shutil.rmtree(marker.parent)
                self.path.mkdir(parents=True, exist_ok=True)
                with atomic_file(self.path / "identity.json") as incoming:
                    incoming.write_text(_text(identity), encoding="utf-8")
                self._drop_images_of_other_prompts(train)

    def _drop_images_of_other_prompts(self, train: Train) -> None:
        """Remove validation images if `train.validation`, which is not part of the identity, has changed."""
        stored, settings = self.path / "validation.json", train.validation.model_dump_json()
        if stored.exists() and stored.read_text(encoding="utf-8") != settings:
            shutil.rmtree(self.path / "validation", ignore_errors=True)
        with atomic_file(stored) as incoming:
            incoming.write_text(settings, encoding="utf-8")

    def is_complete(self, train: Train) -> bool:
        """Whether the run is complete, also with regard to the settings that its identity does not contain."""
        marker = self.path / COMPLETE
        return marker.is_file() and marker.read_text(encoding="utf-8") == _outputs(train)

    @classmethod
    def finished(cls, runs: Path, identity: dict) -> "RunFolder | None":
        """The complete run with this identity, or None."""
        folder = cls(runs / _name(identity))
        return folder if (folder.path / COMPLETE).exists() else None

    @property
    def max_steps(self) -> int:
        """`train.max_steps` of the run."""
        return json.loads((self.path / "identity.json").read_text(encoding="utf-8"))["train"]["max_steps"]

    def metrics(self) -> dict:
        """Metrics, time and memory of a complete run."""
        paths = [self.path / "metrics.json", self.path / "performance.json"]
        return {key: value for path in paths for key, value in json.loads(path.read_text(encoding="utf-8")).items()}

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return max(self.checkpoints(), default=None)

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step.

        Raises:
            UserError: there is none; the message lists the steps that have one.
        """
        by_step = {step_of(path): path for path in self.checkpoints()}
        if step not in by_step:
            existing = ", ".join(map(str, by_step)) or "none"
            raise UserError(f"{self.path}: has no checkpoint of step {step}; it has {existing}")
        return by_step[step]

    def save(
        self,
        progress: Progress,
        learned: Adapter,
        optimizer: Optimizer,
        schedule: LRScheduler,
        accelerator: Accelerator,
        grade: Mapping[str, float] | None = None,
    ) -> None:
        """Write a checkpoint atomically: an adapter, the state needed to continue the run, and its grade, if any."""
        scaler = accelerator.scaler
        state = {
            "step": progress.step,
            "seconds": progress.seconds,
            "rows": progress.rows,
            "speeds": progress.speeds,
            "measured": progress.measured,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        with atomic_directory(self.path / f"step-{progress.step:06d}") as out:
            adapter.save(learned, out, with_pickle=False)
            torch.save(state, out / "state.pt")
            if grade:
                (out / GRADE).write_text(json.dumps(grade, indent=1) + "\n", encoding="utf-8")

    def restore(
        self, checkpoint: Path, optimizer: Optimizer, schedule: LRScheduler, accelerator: Accelerator
    ) -> Progress:
        """Load optimizer, schedule and gradient scaler in place; returns the progress at the checkpoint."""
        state = torch.load(checkpoint / "state.pt", map_location=accelerator.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        return Progress(state["step"], state["seconds"], state["rows"], state["speeds"], state["measured"])

    def prune(self, limit: int | None, keep: int | None = None) -> None:
        """Remove all but the newest `limit` checkpoints and that of the step `keep`; None as limit keeps all."""
        for old in self.checkpoints()[: -limit if limit else 0]:
            if step_of(old) != keep:
                shutil.rmtree(old)

    def run_id(self) -> str | None:
        """Id of the MLflow run that an earlier start of this training opened, or None."""
        path = self.path / RUN_ID
        return json.loads(path.read_text())["run_id"] if path.exists() else None

    def save_run_id(self, tracker: Tracker) -> None:
        """Store the id of the MLflow run, so that a continued training logs to it."""
        if tracker.run_id:
            tracker.write_run_id(self.path / RUN_ID)

    def add_image(self, image: Any, name: str) -> None:
        """Save a validation image."""
        (self.path / "validation").mkdir(exist_ok=True)
        image.save(self.path / "validation" / name)

    def has_images(self, params: Params, step: int) -> bool:
        """Whether the validation images of a step are complete."""
        expected = len(params.validation_prompts) * params.train.validation.num_images
        return len(list(self.path.glob(f"validation/step{step:06d}-*.png"))) == expected

    def finish(self, learned: Adapter, rows: list[dict], summary: dict, performance: dict, train: Train) -> None:
        """Write adapter/, steps.csv, metrics.json and performance.json, then mark the run as complete.

        Args:
            rows: metrics of each step.
            summary: reproducible metrics of the run.
            performance: time and memory, which differ between equal runs.
            train: the run's settings.
        """
        with atomic_directory(self.path / "adapter") as out:
            adapter.save(learned, out)
        with open(self.path / "steps.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        for name, values in (("metrics.json", summary), ("performance.json", performance)):
            (self.path / name).write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        with atomic_file(self.path / COMPLETE) as incoming:
            incoming.write_text(_outputs(train), encoding="utf-8")

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
            if (out / RUN_ID).exists():
                add_adapter(out / RUN_ID, models)
            if not any((out / "validation").iterdir()):  # DVC warns about empty folders
                _no_images().save(out / "validation" / "none.png")


def _no_images() -> Image.Image:
    """What results/train/validation shows without prompts."""
    image = Image.new("RGB", (420, 40), "white")
    ImageDraw.Draw(image).text(
        (10, 12), "no images: train.validation.prompts is empty", "black", ImageFont.load_default(16)
    )
    return image


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint, from its folder's name."""
    return int(checkpoint.name.removeprefix("step-"))


def score_of(checkpoint: Path) -> float | None:
    """Score of a checkpoint that was graded during training; see `selection.Grade`."""
    path = checkpoint / GRADE
    return json.loads(path.read_text(encoding="utf-8"))["score"] if path.exists() else None


def find_runs(runs: Path = RUNS) -> list[RunFolder]:
    """Runs that have a checkpoint, the most recently started or continued first."""
    with_checkpoints = [RunFolder(path) for path in runs.glob("*") if RunFolder(path).last_checkpoint()]
    return sorted(with_checkpoints, key=last_opened, reverse=True)


def find_run(path: Path | None = None, runs: Path = RUNS) -> RunFolder:
    """The run at `path`; None: the run below `runs` that was started or continued most recently.

    Raises:
        UserError: there is no run with a checkpoint.
    """
    if path is not None and RunFolder(path).last_checkpoint():
        return RunFolder(path)
    if path is not None:
        raise UserError(f"{path}: is no run with checkpoints; `customdiff checkpoints` lists existing ones")
    existing = find_runs(runs)
    if not existing:
        raise UserError(f"{runs}: no checkpoints; `dvc repro` writes one every train.checkpointing_steps steps")
    return existing[0]


def find(name: str, runs: Path = RUNS) -> Path:
    """The checkpoint for a value of --checkpoint.

    Args:
        name: folder of a checkpoint; folder of a run, for its last checkpoint; or a step or `latest`, for the most
            recent run. A folder whose name is a number must be written as `./100`.

    Raises:
        UserError: there is no such checkpoint.
    """
    if name == "latest":
        return find_run(runs=runs).checkpoints()[-1]
    if name.isdecimal():
        return find_run(runs=runs).checkpoint(int(name))
    path = RunFolder(Path(name)).last_checkpoint() or Path(name)
    if not (path / CONFIG_FILE).is_file():
        raise UserError(f"{name}: not a checkpoint; `customdiff checkpoints` lists existing ones")
    return path


def last_opened(run: RunFolder) -> float:
    """Time at which a training last opened the folder, which rewrites identity.json."""
    identity = run.path / "identity.json"
    return (identity if identity.exists() else run.path).stat().st_mtime


def _outputs(train: Train) -> str:
    """Settings that determine the files of a run, but not its weights."""
    return train.model_dump_json(include={"validation", "checkpointing_steps", "checkpoints_total_limit"})


def _text(identity: dict) -> str:
    return json.dumps(identity, indent=1, sort_keys=True)


def _name(identity: dict) -> str:
    return hashlib.sha256(_text(identity).encode()).hexdigest()[:16]
