"""The folder of a training run: checkpoints to continue from, and what the run has shown so far.

It lies outside of every DVC output, because DVC deletes a stage's outputs before it runs the stage. Its name is a
hash of the run's identity, so an edited parameter finds an empty folder and never a stranger's state.
"""

import csv
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from customdiff import adapter
from customdiff.adapter import Adapter
from customdiff.files import whole_folder
from customdiff.tracking import Tracker

COMPLETE = "complete"


@dataclass(frozen=True)
class RunFolder:
    """Layout: identity.json, run.json (MLflow), step-000100/ (an adapter and state.pt), validation/, and at the end
    adapter/, steps.csv, metrics.json and the empty file `complete`."""

    path: Path

    @classmethod
    def open(cls, runs: Path, identity: dict, accelerator: Accelerator) -> "RunFolder":
        """The folder of the run with this identity; emptied where that run is complete, for then it is run anew.

        Other runs that are complete are removed: their results lie in DVC's cache.
        """
        text = json.dumps(identity, indent=1, sort_keys=True)
        folder = cls(runs / hashlib.sha256(text.encode()).hexdigest()[:16])
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                for marker in runs.glob(f"*/{COMPLETE}"):
                    shutil.rmtree(marker.parent)
                folder.path.mkdir(parents=True, exist_ok=True)
                (folder.path / "identity.json").write_text(text, encoding="utf-8")
        return folder

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return max(self.checkpoints(), default=None)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("step-*") if path.name.removeprefix("step-").isdigit())

    def save(
        self, step: int, learned: Adapter, optimizer, schedule, accelerator: Accelerator, rows: list[dict]
    ) -> None:
        """Write a checkpoint whole: an adapter that can be sampled from, and all that continuing needs beside it."""
        scaler = accelerator.scaler
        state = {
            "step": step,
            "rows": rows,
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }
        with whole_folder(self.path / f"step-{step:06d}") as out:
            adapter.save(learned, out, pickle_too=False)
            torch.save(state, out / "state.pt")

    def restore(self, checkpoint: Path, optimizer, schedule, accelerator: Accelerator) -> tuple[int, list[dict]]:
        """Take over optimizer, schedule and scaler; returns the steps done and their figures."""
        state = torch.load(checkpoint / "state.pt", map_location=accelerator.device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], state["rows"]

    def prune(self, limit: int | None) -> None:
        """Keep the newest `limit` checkpoints; all where None."""
        for old in self.checkpoints()[: -limit if limit else 0]:
            shutil.rmtree(old)

    def run_id(self) -> str | None:
        """The MLflow run that this training belongs to, where it was begun before."""
        path = self.path / "run.json"
        return json.loads(path.read_text())["run_id"] if path.exists() else None

    def remember(self, tracker: Tracker) -> None:
        """Keep the tracker's run, so that a continued training continues it too."""
        if tracker.run_id:
            tracker.write_card(self.path / "run.json")

    def add_image(self, image: Any, name: str) -> None:
        """Keep a validation image."""
        (self.path / "validation").mkdir(exist_ok=True)
        image.save(self.path / "validation" / name)

    def finish(self, learned: Adapter, rows: list[dict], summary: dict) -> None:
        """Write what the stage hands on: adapter/, steps.csv, metrics.json; then mark the run complete."""
        with whole_folder(self.path / "adapter") as out:
            adapter.save(learned, out)
        with open(self.path / "steps.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        (self.path / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (self.path / COMPLETE).touch()

    def hand_over(self, models: Path, results: Path) -> None:
        """Copy the finished run to models/adapter and results/train, each whole."""
        with whole_folder(models) as out:
            shutil.copytree(self.path / "adapter", out, dirs_exist_ok=True)
        with whole_folder(results) as out:
            (out / "validation").mkdir()
            for name in ("steps.csv", "metrics.json", "run.json", "validation"):
                source = self.path / name
                if source.is_dir():
                    shutil.copytree(source, out / name, dirs_exist_ok=True)
                elif source.exists():
                    shutil.copy2(source, out / name)
