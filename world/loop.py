"""The training loop that all trainings here share: resumable, bounded by minutes, its loss in a file."""

import argparse
import csv
import math
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from tqdm import tqdm

from world.muon import Muon

CHECKPOINT_SECONDS = 120


def trainer_arguments(description: str | None, name: str) -> argparse.Namespace:
    """The command line of a training that exports what it trained to data/<name>."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--clip", type=Path, default=Path("data/clip"), help="CLIP whose vision encoder it starts as")
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None, help="Minutes of training time.")
    parser.add_argument("--restart", action="store_true", help="Fresh optimizer and clock.")
    parser.add_argument("--export", action="store_true", help=f"Grade the last checkpoint and write data/{name}.")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments


def load_params(section: str | None = None):
    """world/params.yaml, or one section of it."""
    params = yaml.safe_load((Path(__file__).parent / "params.yaml").read_text())
    return params if section is None else params[section]


def save_beside(value: object, path: Path) -> None:
    """torch.save beside the target, then rename: a killed run never leaves half a file."""
    beside = path.with_name(path.name + ".part")
    torch.save(value, beside)
    os.replace(beside, path)


def last_checkpoint(folders: Iterable[Path]) -> Path | None:
    """The checkpoint of the last of `folders` that has one: phases of a training lie in folders of their own."""
    found = [path for folder in folders if (path := folder / "checkpoint.pt").exists()]
    return found[-1] if found else None


def lr_share(progress: float, step: int, warmup: int) -> float:
    """Warm-up over `warmup` steps, then constant, then linear to zero over the last third of the run."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1 - progress) / 0.35))


def autocast(device: str):
    """bf16 mixed precision on a GPU, plain fp32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move `ema` towards `model`; faster at first, when the model still changes a lot."""
    decay = min(decay, (1 + step) / (10 + step))
    ours, theirs = list(ema.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def optimizers_for(model: nn.Module, peak_lr: float, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters that train; with `muon` Muon for matrices, AdamW for vectors alone."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    options = {"lr": peak_lr, "betas": (0.9, 0.98), "foreach": True}
    if muon:
        return [
            Muon(matrices, lr=peak_lr, weight_decay=weight_decay),
            torch.optim.AdamW(vectors, weight_decay=0.0, **options),
        ]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, **options)]


@dataclass
class TrainingState:
    """All that a checkpoint holds: model, moving average, optimizers, and how far the training has come."""

    model: nn.Module
    ema: nn.Module | None
    optimizers: list[torch.optim.Optimizer]
    checkpoint: Path
    step: int = 0
    seconds: float = 0.0

    def load(self, device: str, restart: bool) -> None:
        """Continue from the checkpoint, if there is one; with `restart` take its weights and step alone."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
        if not restart:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.seconds = state["seconds"]

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.model.state_dict(), "step": self.step, "seconds": self.seconds}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_beside(state | ({"ema": self.ema.state_dict()} if self.ema is not None else {}), self.checkpoint)

    def descend(self, loss: torch.Tensor, lr: float, ema_decay: float) -> None:
        """One optimizer step, with gradients clipped to norm 1."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not math.isfinite(norm):
            raise FloatingPointError(f"{self.checkpoint.parent.name}: the gradient is {norm} at step {self.step}")
        for optimizer in self.optimizers:
            optimizer.step()
        if self.ema is not None:
            update_ema(self.ema, self.model, ema_decay, self.step)


def fit(
    folder: Path,
    model: nn.Module,
    loss_at: Callable[[int], dict[str, torch.Tensor]],
    *,
    minutes: float,
    peak_lr: float,
    weight_decay: float = 0.0,
    warmup: int = 100,
    ema: nn.Module | None = None,
    ema_decay: float = 0.999,
    muon: bool = False,
    seed: int = 0,
    device: str = "cpu",
    restart: bool = False,
) -> None:
    """Train `model` in place for `minutes` of its own time, counted over all the runs that it took.

    Args:
        folder: where checkpoint.pt and log.csv lie; a checkpoint there is continued.
        loss_at: step number -> named scalars; "loss" is descended, the others are logged. It draws its batch from the
            step number, so that a resumed run sees what an uninterrupted one would have seen.
        ema: a copy of the model, kept as the moving average of its weights.
        muon: descend with Muon, vectors alone with AdamW.
        restart: take the checkpoint's weights, but a fresh optimizer and a fresh clock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = TrainingState(model, ema, optimizers_for(model, peak_lr, weight_decay, muon), folder / "checkpoint.pt")
    state.load(device, restart)

    def stop(*_: object) -> None:
        state.save()
        raise SystemExit(f"{folder.name}: stopped at step {state.step}, saved; the same command continues")

    signal.signal(signal.SIGTERM, stop)
    first, last_save = state.step, time.monotonic()
    bar = tqdm(total=round(60 * minutes), initial=round(state.seconds), unit="s", desc=folder.name, mininterval=10)
    with (folder / "log.csv").open("a", newline="") as file:
        writer = csv.writer(file)
        while (progress := state.seconds / (60 * minutes)) < 1:
            began = time.monotonic()
            torch.manual_seed(hash((seed, state.step)) % 2**63)
            with autocast(device):
                values = loss_at(state.step)
            state.descend(values["loss"], peak_lr * lr_share(progress, state.step - first, warmup), ema_decay)
            state.step += 1
            state.seconds += time.monotonic() - began
            bar.update(round(state.seconds) - bar.n)
            if state.step % 20 == 0:
                row = {name: round(value.item(), 5) for name, value in values.items()}
                bar.set_postfix(row | {"step": state.step}, refresh=False)
                writer.writerow([state.step, round(state.seconds, 1), *(f"{k}={v}" for k, v in row.items())])
                file.flush()
            if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                state.save()
                last_save = time.monotonic()
        state.save()
    bar.close()
