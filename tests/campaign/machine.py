"""Full disks, read-only folders, two runs at once, and a search for planted secrets."""

import shutil
import subprocess
import sys
from pathlib import Path

from . import project
from .case import Tally

SECRET = "S3cr3tPW"
SPARE_MEGABYTES = (0.1, 1, 2, 4, 8, 16)


def full_disks(home: Path, ready: Path, expected: dict[str, str], tally: Tally) -> None:
    """Run the pipeline on small file systems, then again on the same ones after they were enlarged."""
    disk = home / "disk"
    disk.mkdir()
    used = sum(path.stat().st_size for path in ready.rglob("*") if path.is_file()) / 1e6
    for spare in SPARE_MEGABYTES:
        name = f"{spare} MB spare"
        if not _mount(disk, used * 1.1 + 4):
            print("  full disks: not tried, because mounting needs root")
            return
        folder = Path(shutil.copytree(ready, disk / "project", symlinks=True))
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, int(free - spare * 1e6))))
        status, output = project.run(folder, *project.DVC, "repro")
        if status is None or "Traceback" in output:
            tally.add("full disks", name, "hang" if status is None else "traceback", output[-600:])
        else:
            said = status == 0 or "no space left" in output.lower()
            tally.add("full disks", name, "one line" if said else "wrong", output[-600:])
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=2g", disk], check=True)
        status, output = project.run(folder, *project.DVC, "repro")
        _compare("full disks", f"{name}, then enlarged", folder, status, output, expected, tally)
        _unmount(disk)


def read_only(home: Path, ready: Path, tally: Tally) -> None:
    """Stages and commands on a read-only file system."""
    disk = home / "read-only"
    disk.mkdir()
    if not _mount(disk, 1000):
        return
    folder = Path(shutil.copytree(ready, disk / "project", symlinks=True))
    (folder.with_name("project-tmp")).mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    sample = ["-m", "customdiff.cli", "sample", "a <new1> cat", "--steps", "1"]
    for command in (["stages/inputs.py"], ["stages/download_data.py", "cat"], ["stages/train.py"], sample):
        status, output = _run_elsewhere(home, folder, sys.executable, *command)
        lines = [line for line in output.splitlines() if line.startswith("error: ")]
        kind = "traceback" if "Traceback" in output else "one line" if status == 1 and len(lines) == 1 else "wrong"
        tally.add("read-only", " ".join(command), kind, output[-600:])
    _unmount(disk)


def two_at_once(home: Path, ready: Path, expected: dict[str, str], tally: Tally) -> None:
    """Two runs in one project: of `dvc repro`, and of the same stage."""
    train = [sys.executable, "stages/train.py"]
    for name, command in (("dvc repro", [*project.DVC, "repro"]), ("train", train)):
        folder = Path(shutil.copytree(ready, home / f"two-{name[:3]}", symlinks=True))
        both = [project.start(folder, *command) for _ in range(2)]
        statuses = [process.wait(300) for process in both]
        output = folder.with_name(f"{folder.name}-output").read_text(errors="replace")
        kind = "traceback" if "Traceback" in output else "right" if 0 in statuses else "wrong"
        tally.add("two at once", name, kind, f"{statuses} {output[-600:]}")
        status, output = project.run(folder, *project.DVC, "repro")
        _compare("two at once", f"{name}, then dvc repro", folder, status, output, expected, tally)


def planted_secrets(home: Path, done: Path, tally: Tally) -> None:
    """Plant a password and a token in every address, run every stage that can run, and search all files and output."""
    folder = Path(shutil.copytree(done, home / "secrets", symlinks=True))
    address = f"https://bob:{SECRET}@127.0.0.1:9/photos.zip?token={SECRET}"
    service = {"url": f"http://bob:{SECRET}@127.0.0.1:9/knn-service?password={SECRET}", "retries": 0}
    values = {"concepts": {"cat": {"source": {"path": None, "url": address}}}, "retrieve": {"service": service}}
    project.edit(folder, values | {"train": {"max_steps": 5}})
    outputs = [project.run(folder, *project.DVC, "repro")[1]]  # ends at the download
    for stage in (["inputs.py"], ["download_data.py", "cat"], ["train.py"], ["evaluate.py"]):
        outputs.append(project.run(folder, sys.executable, f"stages/{stage[0]}", *stage[1:])[1])
    project.edit(folder, {"retrieve": {"backend": "service"}})
    outputs.append(project.run(folder, sys.executable, "stages/retrieve_class_images.py", "cat")[1])
    for store in (
        f"http://bob:{SECRET}@127.0.0.1:9",
        f"http://127.0.0.1:9/?password={SECRET}",
        f"databricks://{SECRET}",
    ):
        outputs.append(project.run(folder, "env", f"MLFLOW_TRACKING_URI={store}", sys.executable, "stages/train.py")[1])
    places = [f"output: {line[:160]}" for output in outputs for line in output.splitlines() if SECRET in line]
    places += [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "params.yaml" and SECRET.encode() in path.read_bytes()
        if "tests" not in path.relative_to(folder).parts
    ]
    assert "127.0.0.1:9/photos.zip" in (folder / "results/evaluate/report.html").read_text(), "nothing was planted"
    for place in places:
        tally.add("planted secrets", place, "wrongly accepted")
    tally.add("planted secrets", "all other files", "right", count=len(list(folder.rglob("*"))) - len(places))


def _compare(
    group: str, name: str, folder: Path, status: int | None, output: str, expected: dict[str, str], tally: Tally
) -> None:
    found = project.digests(folder)
    wrong = [key for key in expected if found.get(key) != expected[key]] + project.leftovers(folder)
    right = status == 0 and not wrong
    tally.add(group, name, "right" if right else "wrong", f"{status} {wrong[:3]} {output[-400:]}")


def _run_elsewhere(home: Path, folder: Path, *command: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env=project.environment(folder) | {"TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def _mount(folder: Path, megabytes: float) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1e6)}", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)
