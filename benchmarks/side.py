"""One side of a measurement, in a process of its own so that its peak memory is its own.

    python -m benchmarks.side reference SCRIPT PACKAGES OUT ARGUMENT...
    python -m benchmarks.side prepare|train OUT
    python -m benchmarks.side model SHAPE FOLDER DEVICE

Both training loops show their progress with a tqdm bar and update it once an optimizer step. The bar is all that is
replaced: the recording one notes the time and the memory at each update and changes no arithmetic. What was recorded
goes to OUT as JSON.
"""

import json
import platform
import resource
import runpy
import sys
import time
import types
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.configs import CLASS
from customdiff.errors import UserError, one_line_errors

STAGES = Path(__file__).resolve().parent.parent / "stages"

# transformers 5 answers a nested list to a list of one word, and the script then assigns a row from it and stops
BROKEN, MENDED = "tokenizer.encode([initializer_token], ", "tokenizer.encode(initializer_token, "


@dataclass
class Record:
    """What a training loop showed: the time (s) of each update, the losses, and the peak memory at the last update."""

    update_times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_training_mb: float = 0.0

    def bar(self) -> type[tqdm]:
        """A progress bar that takes these notes."""
        record = self

        class Bar(tqdm):
            def update(self, n: float = 1) -> bool | None:
                record.update_times.append(time.time())
                record.peak_training_mb = peak_memory_mb()
                return super().update(n)

            def set_postfix(self, *arguments, **figures) -> None:
                if isinstance(figures.get("loss"), float):
                    record.losses.append(figures["loss"])
                super().set_postfix(*arguments, **figures)

        return Bar

    def write(self, out: Path, **more) -> None:
        """Write the notes as JSON, with what was run on."""
        torch = sys.modules["torch"]
        packages = ("torch", "diffusers", "transformers", "accelerate")
        figures = {
            "peak_process_mb": peak_memory_mb(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        }
        out.write_text(json.dumps(asdict(self) | figures | more), encoding="utf-8")


def peak_memory_mb() -> float:
    """Peak of the GPU's allocator, MB, or of this process's resident memory where no GPU was used."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # Linux gives a child its parent's ru_maxrss to begin with; this begins anew
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def mended(source: str) -> tuple[str, list[str]]:
    """The reference's source as it runs on today's packages, and what was changed in it."""
    if BROKEN in source:
        return source.replace(BROKEN, MENDED), [f"{BROKEN.strip(', ')}: the list became its one word"]
    return source, []


def run_reference(script: Path, packages: str, arguments: list[str], bar: type[tqdm]) -> list[str]:
    """Run the reference's `main` on `arguments`, from a mended copy in memory; returns what was mended.

    Args:
        packages: a folder whose packages are found behind all others (torchvision, which only the reference needs).

    Raises:
        UserError: the script or a package of it is missing.
    """
    sys.path += [packages] * bool(packages)
    source, changes = mended(script.read_text(encoding="utf-8"))
    module = types.ModuleType("reference")
    module.__file__ = str(script)
    sys.modules["reference"] = module
    try:
        exec(compile(source, str(script), "exec"), module.__dict__)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the reference needs {error.name}, which is not installed: `pip install --no-deps --target FOLDER "
            f"{error.name}`, then --packages FOLDER"
        ) from error
    module.tqdm = bar
    options = module.parse_args(arguments)
    options.report_to = None  # its default, tensorboard, would measure a tracker that our side has off
    module.main(options)
    return changes


def run_stage(name: str, *arguments: str) -> None:
    """Run one of our stage scripts as `dvc repro` does, in the working folder."""
    sys.argv = [str(STAGES / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main(side: str, *arguments: str) -> None:
    record = Record()
    if side == "model":
        from benchmarks import models

        shape, folder, device = arguments
        models.save(shape, Path(folder), device)
    elif side == "reference":
        script, packages, out, *options = arguments
        record.write(Path(out), mended=run_reference(Path(script), packages, options, record.bar()))
    elif side == "prepare":
        run_stage("prepare", CLASS)
        record.write(Path(arguments[0]))
    elif side == "train":
        from customdiff.training import trainer

        trainer.tqdm = record.bar()
        run_stage("train")
        record.write(Path(arguments[0]))


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
