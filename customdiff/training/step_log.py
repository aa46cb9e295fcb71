"""Metrics of each training step, and the summary of a run."""

import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from customdiff.tracking import Tracker

LOSSES = ("loss", "instance_loss", "prior_loss")
SPEED = ("images_per_second", "peak_memory_mb")


@dataclass
class StepLog:
    """Metrics of each step. They stay on the device until `every` steps are due, so the loop never waits for them.

    Attributes:
        rows: what has been logged: `step`, losses, `grad_norm` and `learning_rate`; equal in two equal runs.
        speeds: `images_per_second` of each row.
    """

    tracker: Tracker
    every: int
    images_per_step: int
    rows: list[dict[str, float]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    pending: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: dict) -> None:
        """Take one step's metrics, tensors or numbers; log them once `every` steps have accumulated."""
        self.pending.append(row)
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Log pending steps, with the speed since `restart_clock` or the last flush."""
        if not self.pending:
            return
        seconds = time.perf_counter() - self.started
        speed = self.images_per_step * len(self.pending) / seconds
        shared = {"images_per_second": speed, "peak_memory_mb": peak_memory_mb()}
        for pending in self.pending:
            row = {key: value if key == "step" else float(value) for key, value in pending.items()}
            self.rows.append(row)
            self.speeds.append(speed)
            metrics = {key: value for key, value in row.items() if key != "step"}
            self.tracker.metrics(metrics | shared, step=pending["step"])
        self.pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude from the speed what happened since the last step: validation images, a checkpoint."""
        self.started = time.perf_counter()


def peak_memory_mb() -> float:
    """Peak memory so far, MB: of the GPU's allocator, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def summary(rows: Sequence[Mapping], trained_parameters: int) -> dict[str, float]:
    """Reproducible metrics of a run; losses are means over its last tenth, because single steps scatter."""
    last = rows[-max(1, len(rows) // 10) :]
    final = {f"final_{key}": sum(row[key] for row in last) / len(last) for key in LOSSES if key in last[0]}
    return final | {"steps": len(rows), "trained_parameters": trained_parameters}


def performance(log: StepLog, seconds: float) -> dict[str, float]:
    """Seconds, images per second and peak memory (MB) of a run; they differ from one run to the next."""
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(statistics.median(log.speeds), 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }
