"""Clones of this work tree with a params.yaml of as little work as possible, and `dvc repro` in them."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
DVC = [sys.executable, "-m", "dvc"]
SMALL = {
    "retrieve": {"backend": "folder", "num_class_images": 5, "minimum": 4, "folder": "class-images"},
    "prepare": {"views": 4},
    "train": {"max_steps": 6, "checkpointing_steps": 2, "validation": {"every": 3, "steps": 2}},
    "evaluate": {"num_images": 1, "steps": 2, "prompts": "prompts", "bootstrap": 100},
    "tracking": {"log_every": 2},
}
OUTPUTS = ("data/inputs", "data/instances", "data/classes", "data/index", "data/prepared", "models", "results")
VARYING = {"performance.json", "run.json", "report.html"}  # time, MLflow's random id, and a page that shows them


def make(folder: Path, changes: dict | None = None) -> Path:
    """A clone of the tracked and new files of this work tree in a new folder, as a git repository of its own."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(("results/", "world/", "docs/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    without = shutil.ignore_patterns("*.txt", "*.md")
    shutil.copytree(ROOT / "data/concepts/teapot", folder / "class-images", ignore=without)
    (folder / "prompts").mkdir()
    (folder / "prompts/default.txt").write_text("a {} on the grass\na {} on a red background\n")
    (folder / "dvc.lock").unlink(missing_ok=True)
    edit(folder, SMALL)
    edit(folder, changes or {})
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def edit(folder: Path, changes: dict) -> None:
    """Change keys of params.yaml."""
    path = folder / "params.yaml"
    values = yaml.safe_load(path.read_text())
    _merge(values, changes)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _merge(values: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def environment(folder: Path) -> dict[str, str]:
    """Environment of commands in a clone; its temporary files are in `tmp` beside the clone."""
    temporary = folder.with_name(f"{folder.name}-tmp")
    temporary.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    return settings | {
        "PATH": path,
        "PYTHONPATH": str(folder),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
    }


def start(folder: Path, *command: str) -> subprocess.Popen:
    """Start a command in a session of its own; its output goes to `output` beside the clone."""

    def default_signals() -> None:  # a background job ignores SIGINT, and its children would too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with folder.with_name(f"{folder.name}-output").open("a") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=default_signals,
        )


def run(folder: Path, *command: str, limit: float = 300) -> tuple[int | None, str]:
    """Exit status, None for a hang, and output of a command."""
    output = folder.with_name(f"{folder.name}-output")
    output.unlink(missing_ok=True)
    process = start(folder, *command)
    try:
        status: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        end(process)
        status = None
    return status, output.read_text(errors="replace")


def end(process: subprocess.Popen) -> None:
    """Kill a process and its descendants."""
    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def orphans(folder: Path, patience: float = 10) -> list[str]:
    """Command lines of processes that still run in a clone after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd().startswith(str(folder)):
                    found.append(" ".join(process.cmdline())[:100])
            except (psutil.Error, OSError):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all outputs that equal runs have in common."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for top in OUTPUTS
        for path in sorted((folder / top).rglob("*"))
        if path.is_file() and path.name not in VARYING
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary files, folders and locks of ours in a clone and in its folder of temporary files."""
    names = [
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if ".dvc" not in path.parts and path.name.endswith((".incoming", ".lock"))
    ]
    return names + [path.name for path in folder.with_name(f"{folder.name}-tmp").glob("customdiff*")]
