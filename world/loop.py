"""The training loop that all trainings here share: resumable, bounded by minutes, its loss in a file."""

import csv
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import yaml
from torch import nn
from tqdm import tqdm

from world.muon import Muon

CHECKPOINT_SECONDS = 120


def load_params(section: str | None = None):
    """world/params.yaml, or one section of it."""
    params = yaml.safe_load((Path(__file__).parent / "params.yaml").read_text())
    return params if section is None else params[section]


def save_beside(value: object, path: Path) -> None:
    """torch.save beside the target, then rename: a killed run never leaves half a file."""
    beside = path.with_name(path.name + ".part")
    torch.save(value, beside)
    os.replace(beside, path)


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
    checkpoint, log = folder / "checkpoint.pt", folder / "log.csv"
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if muon:
        optimizers = [
            Muon(decayed, lr=peak_lr, weight_decay=weight_decay),
            torch.optim.AdamW(plain, lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True),
        ]
    else:
        optimizers = [torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), foreach=True)]
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
        step = state["step"]
        if not restart:
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            seconds = state["seconds"]

    def save() -> None:
        state = {"model": model.state_dict(), "step": step, "seconds": seconds}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save_beside(state | ({"ema": ema.state_dict()} if ema is not None else {}), checkpoint)

    def stop(*_: object) -> None:
        save()
        raise SystemExit(f"{folder.name}: stopped at step {step}, saved; the same command continues")

    signal.signal(signal.SIGTERM, stop)
    first, last_save = step, time.monotonic()
    bar = tqdm(total=round(60 * minutes), initial=round(seconds), unit="s", desc=folder.name, mininterval=10)
    with log.open("a", newline="") as file:
        writer = csv.writer(file)
        while (progress := seconds / (60 * minutes)) < 1:
            began = time.monotonic()
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = peak_lr * lr_share(progress, step - first, warmup)
            torch.manual_seed(hash((seed, step)) % 2**63)
            with autocast(device):
                values = loss_at(step)
            model.zero_grad(set_to_none=True)
            values["loss"].backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(norm):
                raise FloatingPointError(f"{folder.name}: the gradient is {norm} at step {step}")
            for optimizer in optimizers:
                optimizer.step()
            if ema is not None:
                update_ema(ema, model, ema_decay, step)
            step += 1
            seconds += time.monotonic() - began
            bar.update(round(seconds) - bar.n)
            if step % 20 == 0:
                row = {name: round(value.item(), 5) for name, value in values.items()}
                bar.set_postfix(row | {"step": step}, refresh=False)
                writer.writerow([step, round(seconds, 1), *(f"{k}={v}" for k, v in row.items())])
                file.flush()
            if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                save()
                last_save = time.monotonic()
        save()
    bar.close()
