"""Metrics of each training step, and the summary of a run."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from customdiff.errors import UserError
from customdiff.tracking import Tracker

LOSSES = ("loss", "instance_loss", "prior_loss")


@dataclass
class StepLog:
    """Log of the metrics of each step.

    Metrics stay on the device until `every` steps have accumulated, so the training loop rarely waits for the device.

    Attributes:
        rows: logged metrics of each step: `step`, losses, `grad_norm` (None where it is not
            finite, as after a skipped fp16 step) and `learning_rate`; identical in equal runs.
        speeds: `images_per_second` of each row.
        pending: metrics of steps that are not logged yet.
    """

    tracker: Tracker
    every: int
    images_per_step: int
    rows: list[dict[str, float | None]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    pending: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: dict) -> None:
        """Add the metrics of one step, tensors or numbers; log pending steps once there are `every` of them."""
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
            if not math.isfinite(row["grad_norm"]):
                row["grad_norm"] = None
            self.rows.append(row)
            self.speeds.append(speed)
            metrics = {key: value for key, value in row.items() if key != "step"}
            self.tracker.metrics(metrics | shared, step=pending["step"])
        self.pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step, spent on validation images or a checkpoint, from the speed."""
        self.started = time.perf_counter()


def check_finite(log: StepLog, trained: Iterable[torch.Tensor], checkpoint: Path | None) -> None:
    """Stop a run that has diverged.

    Args:
        trained: the trained weights after the last logged step.
        checkpoint: the last checkpoint, if there is one.

    Raises:
        UserError: a loss of the last steps or a weight is NaN or infinite.
    """
    recent = log.rows[-log.every :]
    bad = [row["step"] for row in recent if not all(math.isfinite(row[key] or 0) for key in LOSSES if key in row)]
    finite = not bad and bool(torch.stack([weight.detach().isfinite().all() for weight in trained]).all())
    if finite:
        return
    what = (
        f"the loss is not finite at step {bad[0]}"
        if bad
        else f"a weight is not finite after step {log.rows[-1]['step']}"
    )
    raise UserError(
        f"train.learning_rate: {what} (rate of the optimizer: {log.rows[-1]['learning_rate']:g}); lower it, or "
        f"train.mixed_precision: no; last good checkpoint: {checkpoint or 'none'}"
    )


def peak_memory_mb() -> float:
    """Peak memory so far in MB: of the GPU allocator, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def summary(rows: Sequence[Mapping], trained_parameters: int) -> dict[str, float]:
    """Reproducible metrics of a run; losses are means over the last tenth of its steps, because they vary."""
    last = rows[-max(1, len(rows) // 10) :]
    final = {f"final_{key}": sum(row[key] for row in last) / len(last) for key in LOSSES if key in last[0]}
    return final | {"steps": len(rows), "trained_parameters": trained_parameters}


def performance(log: StepLog, seconds: float) -> dict[str, float]:
    """Time and memory of a run, which differ between equal runs."""
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(statistics.median(log.speeds), 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }
