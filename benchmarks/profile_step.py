"""Profile of our training step by region, compared with the time of its arithmetic at the machine's speed.

    python -m benchmarks.profile_step --config quarter-256

The stage script runs as it is; wrappers around the names of its parts read the clock. See README.md.
"""

import functools
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks import project
from benchmarks.configs import BATCH_SIZE, CONFIGS, IMAGES_A_STEP, SEED, config
from benchmarks.project import Machine
from customdiff.errors import one_line_errors

WARM_UP = 5  # steps left out; the arithmetic of the last of them is counted
REST = "all else in the step"
SECONDS = "seconds"


class Meter:
    """Seconds of each region of a step, and in one step the floating-point operations of each operator.

    A region's figures exclude those of regions called inside it. As a context manager it removes its wrappers at exit.
    """

    def __init__(self, synchronize=lambda: None):
        """`synchronize` waits until the device has finished."""
        self.synchronize = synchronize
        self.steps: list[dict[str, Counter]] = []
        self._inner: list[Counter] = []
        self._counter = None
        self._wrapped: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *problem: object) -> None:
        while self._wrapped:
            setattr(*self._wrapped.pop())

    def wrap(self, owner: Any, name: str, region: str) -> None:
        """Measure every call of `owner.name` inside a step as `region`."""
        called = getattr(owner, name)
        self._wrapped.append((owner, name, called))

        @functools.wraps(called)
        def measured(*arguments, **options):
            if not self.steps:
                return called(*arguments, **options)
            before = self._read()
            self._inner.append(Counter())
            try:
                return called(*arguments, **options)
            finally:
                spent = _less(self._read(), before)
                own = _less(spent, self._inner.pop())
                self.steps[-1].setdefault(region, Counter()).update(own)
                if self._inner:
                    self._inner[-1].update(spent)

        setattr(owner, name, measured)

    def wrap_step(self, owner: Any, name: str) -> None:
        """Count every call of `owner.name` as a step; time outside of regions is `REST`."""
        self.wrap(owner, name, REST)
        step = getattr(owner, name)

        @functools.wraps(step)
        def opened(*arguments, **options):
            self.steps.append({})
            with self._counting() if len(self.steps) == WARM_UP else nullcontext():
                return step(*arguments, **options)

        setattr(owner, name, opened)

    def seconds(self) -> dict[str, float]:
        """Median seconds per step of each region, the longest first."""
        rows = self.steps[WARM_UP:]
        medians = {
            region: statistics.median(row[region][SECONDS] for row in rows if region in row) for region in rows[0]
        }
        return dict(sorted(medians.items(), key=lambda pair: -pair[1]))

    def step_seconds(self) -> float:
        """Median seconds of a whole step."""
        return statistics.median(sum(spent[SECONDS] for spent in row.values()) for row in self.steps[WARM_UP:])

    def operations(self) -> dict[str, Counter]:
        """Floating point operations of a step by region and operator."""
        return {
            region: Counter({name: count for name, count in spent.items() if name != SECONDS})
            for region, spent in self.steps[WARM_UP - 1].items()
        }

    def _counting(self):
        from torch.utils.flop_counter import FlopCounterMode

        self._counter = FlopCounterMode(display=False)
        return self._counter

    def _read(self) -> Counter:
        self.synchronize()
        counted = self._counter.get_flop_counts().get("Global", {}) if self._counter else {}
        return Counter({str(name): count for name, count in counted.items()} | {SECONDS: time.perf_counter()})


def _less(one: Counter, other: Counter) -> Counter:
    """`one` minus `other`, zeros and negative values kept."""
    return Counter({name: one[name] - other[name] for name in one.keys() | other.keys()})


def wrap_training(meter: Meter) -> None:
    """Put the meter around the parts of `trainer.Trainer.step`, by their public names."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers import UNet2DConditionModel

    from customdiff.training import trainer

    meter.wrap(trainer.Batches, "draw", "draw a batch")
    meter.wrap(trainer, "encode_text", "text encoder, forward")
    meter.wrap(UNet2DConditionModel, "forward", "UNet, forward")
    meter.wrap(trainer, "losses", "losses")
    meter.wrap(Accelerator, "backward", "backward")
    meter.wrap(Accelerator, "clip_grad_norm_", "clip the gradient")
    meter.wrap(AcceleratedOptimizer, "step", "optimizer")
    meter.wrap_step(trainer.Trainer, "step")
    meter.wrap(trainer.StepLog, "add", "log")  # between two steps; it counts to the step before


def speeds(device: str, dtype) -> dict[str, float]:
    """Floating point operations a second of this machine: a large matrix product, and a 3x3 convolution.

    Both at a size that suits it, so that what is divided by them is a bound that no step of that arithmetic beats.
    """
    import torch

    side, width = (1024, 320) if device == "cpu" else (8192, 1280)
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    image = torch.randn(4, width, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(width, width, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return {
            "matrix product": 2 * side**3 / _fastest(lambda: one @ other, device),
            "convolution": 2
            * 9
            * width**2
            * 4
            * 32**2
            / _fastest(lambda: torch.nn.functional.conv2d(image, kernel, padding=1), device),
        }


def _fastest(work, device: str, times: int = 20) -> float:
    """Seconds of the fastest of several calls."""
    synchronize = synchronizer(device)
    found = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def synchronizer(device: str):
    """A function that waits for the device."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def floor_seconds(operations: Counter, speed: dict[str, float]) -> float:
    """The least time for `operations`: convolutions at the convolution's speed, all others at the product's."""
    return sum(
        count / speed["convolution" if "conv" in name else "matrix product"] for name, count in operations.items()
    )


def report(meter: Meter, speed: dict[str, float]) -> str:
    """A table of regions: seconds, share, floating point operations, their floor, and the floor's share."""
    whole = meter.step_seconds()
    operations = meter.operations()
    lines = [f"{'':26}{'ms':>9}{'share':>8}{'GFLOP':>10}{'floor, ms':>11}{'floor / time':>14}"]
    floor = 0.0
    for region, seconds in meter.seconds().items():
        least = floor_seconds(operations.get(region, Counter()), speed)
        floor += least
        lines.append(_line(region, seconds, whole, sum(operations.get(region, Counter()).values()), least))
    total = sum(sum(counted.values()) for counted in operations.values())
    lines.append(_line("the whole step", whole, whole, total, floor))
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in speed.items())
    return "\n".join([*lines, f"{IMAGES_A_STEP / whole:.2f} images/s; this machine: {rates}"])


def _line(region: str, seconds: float, whole: float, operations: int, least: float) -> str:
    counted = f"{operations / 1e9:10.2f}{least * 1e3:11.1f}{least / seconds:14.0%}" if operations else ""
    return f"{region:26}{seconds * 1e3:9.1f}{seconds / whole:8.1%}{counted}"


def main(
    name: Annotated[str, typer.Option("--config", help=f"One of {', '.join(CONFIGS)}.")] = "embedded",
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    precision: Annotated[
        Literal["no", "fp16", "bf16"] | None, typer.Option(help="By default no (fp32) on cpu, bf16 on cuda.")
    ] = None,
    steps: Annotated[int, typer.Option(min=WARM_UP + 3)] = 30,
    threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
    operators: Annotated[int, typer.Option(min=0, help="How many of PyTorch's operators to list, by time.")] = 0,
    work: Annotated[Path | None, typer.Option(help="As in against_reference.")] = None,
) -> None:
    """Prepare and train in this process, and print where the steps' time went."""
    machine = Machine(device, threads, precision or ("no" if device == "cpu" else "bf16"))
    if "CUSTOMDIFF_PROFILED" not in os.environ:  # threads and the hidden GPU must be set before torch is imported
        environment = machine.environment | {"CUSTOMDIFF_PROFILED": "1"}
        sys.exit(
            subprocess.run([sys.executable, "-m", "benchmarks.profile_step", *sys.argv[1:]], env=environment).returncode
        )
    with tempfile.TemporaryDirectory() as temporary:
        made = project.make((work or Path(temporary)) / name, config(name), machine, steps)
        made.write_params(SEED)
        made.run("prepare", str(made.folder / "prepare.json"), cwd=made.ours)

        from customdiff.models.base import DTYPES

        speed = speeds(device, DTYPES[machine.precision])
        os.chdir(made.ours)
        sys.argv = [str(project.ROOT / "stages/train.py")]
        with Meter(synchronizer(device)) as meter, _operators(operators, device) as listed:
            wrap_training(meter)
            runpy.run_path(sys.argv[0], run_name="__main__")
    print(
        f"{name}: {config(name).resolution} px, batch {BATCH_SIZE}+{BATCH_SIZE}, {device}, {threads} threads, "
        f"precision {machine.precision}; medians of {steps - WARM_UP} steps\n{report(meter, speed)}"
    )
    if operators:
        by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        print(listed.key_averages().table(sort_by=by, row_limit=operators, max_name_column_width=60))


def _operators(count: int, device: str):
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    return profile(activities=kinds) if count else nullcontext()


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
