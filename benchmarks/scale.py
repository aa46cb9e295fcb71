"""How time and memory grow: with concepts, class images, prompts, resolution, processes, and the pool's index.

    python -m benchmarks.scale concepts
    python -m benchmarks.scale index 1000 10000 100000 1000000

Each prints a table. Every stage runs in a process of its own, on one machine that does nothing else meanwhile.
"""

import atexit
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
import yaml

from benchmarks import project
from benchmarks.configs import CLASS, CONFIGS, IMAGES_A_STEP, SEED
from benchmarks.project import ROOT, Machine, Project
from customdiff.errors import UserError, one_line_errors
from customdiff.retrieval import clip_index

THREADS = os.cpu_count() or 1
MACHINE = Machine("cpu", THREADS, "no")
WIDTH = 512  # of the index's vectors: ViT-B/32's
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


class Cost(NamedTuple):
    """Of one process and all that it started."""

    seconds: float
    peak_mb: float


class Trained(NamedTuple):
    """What a training noted of itself."""

    seconds_a_step: float
    peak_mb: float
    start_seconds: float  # of the process, beside its steps
    losses: list[float]


class Table:
    """A Markdown table, printed as it grows; numbers below 1000 with three significant digits."""

    def __init__(self, *names: str) -> None:
        print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}", flush=True)

    def add(self, *values: float) -> None:
        """Print a row."""
        texts = [f"{x:.3g}" if isinstance(x, float) and x < 1000 else f"{x:.0f}" for x in values]
        print(f"| {' | '.join(texts)} |", flush=True)


def stage(folder: Path, name: str, *arguments: str, machine: Machine = MACHINE) -> Cost:
    """Run a stage script in a project's folder.

    Raises:
        UserError: it failed; its last lines are in the message.
    """
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / f"stages/{name}.py"), *arguments],
            cwd=folder,
            env=machine.environment,
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            output.seek(0)
            raise UserError(f"{name} failed: {' | '.join(output.read().splitlines()[-5:])}")
    return Cost(seconds, usage.ru_maxrss * 1024 / 1e6)


def train(folder: Path, machine: Machine = MACHINE) -> Trained:
    """Train from the beginning."""
    shutil.rmtree(folder / ".checkpoints", ignore_errors=True)
    seconds, _ = stage(folder, "train", machine=machine)
    noted = json.loads((folder / "results/train/performance.json").read_text(encoding="utf-8"))
    steps = np.genfromtxt(folder / "results/train/steps.csv", delimiter=",", names=True)
    return Trained(
        IMAGES_A_STEP / noted["images_per_second"],
        noted["peak_memory_mb"],
        seconds - noted["seconds"],
        steps["loss"].tolist(),
    )


def change(work: Project, **sections: dict) -> None:
    """Change keys of our params.yaml, section by section; `concepts` is replaced as a whole."""
    path = work.ours / "params.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, keys in sections.items():
        values[name] = keys if name == "concepts" else values.get(name, {}) | keys
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def made(folder: Path, name: str, steps: int, **changes) -> Project:
    """A project of the configuration `name`, changed; its models are kept in `folder`."""
    work = project.make(folder / name, replace(CONFIGS[name], **changes), MACHINE, steps)
    work.write_params(SEED)
    change(work, tracking={"enabled": False, "log_every": 5})
    return work


WORK = Annotated[Path | None, typer.Option(help="Folder for models and runs, kept; by default a temporary one.")]


def in_folder(work: Path | None) -> Path:
    """The folder to work in; one of our own is removed at the end."""
    if work is None:
        work = Path(tempfile.mkdtemp(prefix="customdiff-scale-"))
        atexit.register(shutil.rmtree, work, ignore_errors=True)
    return work


@app.command()
def concepts(counts: Annotated[list[int], typer.Argument()] = (1, 2, 4, 8), steps: int = 40, work: WORK = None) -> None:
    """Concepts learned jointly, each with the embedded cat's photos and 50 class images."""
    one = made(in_folder(work), "embedded", steps)
    (concept,) = yaml.safe_load((one.ours / "params.yaml").read_text(encoding="utf-8"))["concepts"].values()
    names = [CLASS, *(f"{CLASS}{number}" for number in range(2, max(counts) + 1))]
    for name, kind in itertools.product(names[1:], ("instances", "classes")):
        link = one.ours / "data" / kind / name
        link.unlink(missing_ok=True)
        link.symlink_to((one.ours / "data" / kind / CLASS).resolve())
    everything = {name: concept | {"modifier_token": f"<new{number}>"} for number, name in enumerate(names, 1)}
    change(one, concepts=everything)
    prepared = [stage(one.ours, "prepare", name).seconds for name in names]
    rows = Table("concepts", "prepare, s", "start of train, s", "s a step", "peak, MB", "adapter, MB")
    for count in counts:
        change(one, concepts=dict(itertools.islice(everything.items(), count)))
        found = train(one.ours)
        size = sum(path.stat().st_size for path in (one.ours / "models/adapter").glob("*.safetensors")) / 1e6
        rows.add(count, sum(prepared[:count]), found.start_seconds, found.seconds_a_step, found.peak_mb, size)


@app.command("class-images")
def class_images(
    counts: Annotated[list[int], typer.Argument()] = (200, 1000, 5000), steps: int = 40, work: WORK = None
) -> None:
    """Class images of 64 px, all their captions different."""
    folder = in_folder(work)
    rows = Table(
        "class images", "prepare, s", "its peak, MB", "prepared set, MB", "start of train, s", "s a step", "peak, MB"
    )
    for count in counts:
        one = made(folder, "embedded", steps)
        classes = one.ours / "data/classes" / CLASS
        images = (classes / "images.txt").read_text(encoding="utf-8").splitlines()
        captions = (classes / "caption.txt").read_text(encoding="utf-8").splitlines()
        numbered = [f"{captions[number % len(images)]} {number}" for number in range(count)]
        (classes / "images.txt").write_text("\n".join(images[n % len(images)] for n in range(count)) + "\n")
        (classes / "caption.txt").write_text("\n".join(numbered) + "\n", encoding="utf-8")
        prepared = stage(one.ours, "prepare", CLASS)
        found = train(one.ours)
        size = sum(path.stat().st_size for path in (one.ours / "data/prepared").rglob("*")) / 1e6
        rows.add(count, *prepared, size, found.start_seconds, found.seconds_a_step, found.peak_mb)


@app.command()
def prompts(counts: Annotated[list[int], typer.Argument()] = (10, 40, 160), work: WORK = None) -> None:
    """Prompts that `evaluate` draws, one image each by either model, in 5 steps of the sampler."""
    one = made(in_folder(work), "embedded", 10)
    stage(one.ours, "prepare", CLASS)
    train(one.ours)
    rows = Table("prompts", "evaluate, s", "peak, MB", "again, the base's pictures kept, s")
    for count in counts:
        lines = "".join(f"a photo of a {{}} number {number}\n" for number in range(count))
        (one.ours / "prompts").mkdir(exist_ok=True)
        (one.ours / "prompts/default.txt").write_text(lines, encoding="utf-8")
        settings = {"prompts": "prompts", "num_images": 1, "steps": 5, "clip": str(ROOT / "data/judge")}
        change(one, evaluate=settings)
        shutil.rmtree(one.ours / ".base-images", ignore_errors=True)
        first, again = (stage(one.ours, "evaluate") for _ in range(2))
        rows.add(count, *first, again.seconds)


@app.command()
def resolution(
    sides: Annotated[list[int], typer.Argument()] = (128, 256, 512), steps: int = 10, work: WORK = None
) -> None:
    """Image side in pixels, on Stable Diffusion's shape at a quarter of its width; 20 views and 20 class images."""
    folder = in_folder(work)
    rows = Table("px", "prepare, s", "its peak, MB", "s a step", "peak, MB")
    for side in sides:
        one = made(folder, "quarter-256", steps, resolution=side, class_images=20)
        change(one, prepare={"resolution": side, "views": 4}, tracking={"log_every": 1})
        prepared = stage(one.ours, "prepare", CLASS)
        found = train(one.ours)
        rows.add(side, prepared.seconds, prepared.peak_mb, found.seconds_a_step, found.peak_mb)


@app.command()
def processes(counts: Annotated[list[int], typer.Argument()] = (1, 2), steps: int = 20, work: WORK = None) -> None:
    """Processes that share the cores and a global batch of 2 + 2, on the quarter-width shape at 256 px."""
    one = made(in_folder(work), "quarter-256", steps, class_images=20)
    change(one, prepare={"views": 4}, tracking={"log_every": 5})
    stage(one.ours, "prepare", CLASS)
    losses = []
    rows = Table("processes", "threads each", "s a step", "peak of one, MB", "losses apart, relative")
    for count in counts:
        change(one, train={"batch_size": 2 // count, "launch": {"num_processes": count}})
        machine = replace(MACHINE, threads=max(1, THREADS // count))
        found = train(one.ours, machine)
        losses.append(np.array(found.losses))
        apart = float(np.abs(losses[-1] / losses[0] - 1).max())
        rows.add(count, machine.threads, found.seconds_a_step, found.peak_mb, apart)


@app.command()
def index(sizes: Annotated[list[int], typer.Argument()] = (1_000, 10_000, 100_000, 1_000_000), hits: int = 200) -> None:
    """A query of the pool's index for `hits` images, over random unit vectors of 512 numbers."""
    rows = Table("images", "embeddings, MB", "with names, MB", f"query of {hits}, s", "again, s")
    query = np.random.default_rng(1).normal(size=WIDTH).astype(np.float32)
    query /= np.linalg.norm(query)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="customdiff-scale-") as name:
            folder = Path(name)
            _synthetic(folder, size)
            seconds = []
            for _ in range(2):
                started = time.perf_counter()
                found = list(itertools.islice(clip_index.query_index(folder, query, duplicate_similarity=0.95), hits))
                seconds.append(time.perf_counter() - started)
            assert len(found) == min(hits, size)
            bytes_of = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
            rows.add(size, bytes_of[folder / clip_index.EMBEDDINGS] / 1e6, sum(bytes_of.values()) / 1e6, *seconds)


def _synthetic(folder: Path, size: int) -> None:
    """What `build_index` writes, over vectors of no pictures."""
    path = folder / clip_index.EMBEDDINGS
    path.parent.mkdir()
    vectors = np.lib.format.open_memmap(path, "w+", np.float16, (size, WIDTH))
    rng = np.random.default_rng(0)
    for at in range(0, size, 10_000):
        part = rng.normal(size=(min(10_000, size - at), WIDTH)).astype(np.float32)
        vectors[at : at + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    vectors.flush()
    rows = [{"name": f"{number:08}.jpg", "caption": f"picture {number}"} for number in range(size)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        app()
