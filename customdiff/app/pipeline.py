"""`dvc repro` as a process that outlives the page: start, stop, find again, and read its progress from its log.

`python -m customdiff.app.pipeline` is that process: it runs DVC and writes the exit status to `RUN`.
"""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from customdiff.errors import UserError, printable
from customdiff.files import locked
from customdiff.redaction import redact

FOLDER = Path(".customdiff")
RUN, LOG = FOLDER / "run.json", FOLDER / "run.log"
DVC = [sys.executable, "-m", "dvc", "repro"]
LOCKS = Path(".dvc/tmp")
BAR = re.compile(r"^(?P<label>[\w ,-]+):\s+\d+%\|.*\| (?P<done>\d+)/(?P<total>\d+) \[(?P<rest>.*)\]")
LOSS = re.compile(r"loss=(?P<loss>[\d.]+)")
STAGE = re.compile(r"^(?:Running stage|Stage) '(?P<name>[^']+)'(?P<rest>.*)")


@dataclass
class Progress:
    """What the log of a run says.

    Attributes:
        stages: state of each stage that was reached: running, done, unchanged, or how the run ended in it.
        label, done, total: the last progress bar; total is 0 before the first one of a stage.
        losses: training loss by step.
        lines: the last lines, without progress bars.
    """

    stages: dict[str, str] = field(default_factory=dict)
    label: str = ""
    done: int = 0
    total: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def start() -> None:
    """Start `dvc repro` in a session of its own, so that it outlives the page.

    Raises:
        UserError: a pipeline is running in this project; names its process.
    """
    with locked(RUN):
        if running():
            raise UserError("the pipeline is running already; its progress is below")
        if holder := foreign():
            raise UserError(
                f"process {holder.pid} ({command(holder)}) is running the pipeline in another terminal; wait until it "
                "has finished, or stop it there with Ctrl-C"
            )
        with LOG.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "customdiff.app.pipeline"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"},
            )
        _write({"pid": process.pid, "started": psutil.Process(process.pid).create_time(), "status": None})


def main() -> None:
    """Run DVC, and write its exit status; a signal to the session reaches the stage, and this process waits for it."""
    signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which DVC and the stages would inherit
    status = subprocess.call(DVC)
    with locked(RUN):
        _write(_read() | {"status": status})


def stop() -> None:
    """Send what Ctrl-C sends; a training writes a checkpoint first. Does nothing without a run of this page."""
    with locked(RUN):
        if process := running():
            _write(_read() | {"stopped": True})
            os.killpg(process.pid, signal.SIGINT)


def running() -> psutil.Process | None:
    """The process of the run that this page, or another one, has started; None if it has ended."""
    run = _read()
    try:
        process = psutil.Process(run["pid"])
        same = abs(process.create_time() - run["started"]) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError):
        return None


def foreign() -> psutil.Process | None:
    """A process that holds a lock of DVC in this project, and that no page has started."""
    own = running()
    for pid in _holders():
        try:
            process = psutil.Process(pid)
            is_dvc = any("dvc" in word for word in process.cmdline())  # its number may be another program's by now
            if is_dvc and (own is None or os.getsid(pid) != own.pid):
                return process
        except (psutil.Error, OSError):
            continue  # it has ended
    return None


def command(process: psutil.Process) -> str:
    """The command line of a process, without secrets, for the user."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return "ended meanwhile"
    return printable(redact(" ".join(words)))[:120]


def outcome() -> str:
    """How the last run ended: an empty text if there was none or it is running, else finished, stopped,
    failed or killed.
    """
    run = _read()
    if not run or running():
        return ""
    if run["status"] is None or run["status"] < 0:
        return "killed"
    return "finished" if run["status"] == 0 else "stopped" if run.get("stopped") else "failed"


def progress() -> Progress:
    """What the log of the last run says."""
    found = Progress()
    for line in re.split(r"[\r\n]+", _log()):
        if bar := BAR.match(line):
            found.label, found.done, found.total = bar["label"], int(bar["done"]), int(bar["total"])
            if loss := LOSS.search(bar["rest"]):
                found.losses[found.done] = float(loss["loss"])
        elif stage := STAGE.match(line):
            found.stages = {name: "done" if state == "running" else state for name, state in found.stages.items()}
            unchanged = "skipping" in stage["rest"]
            found.stages[stage["name"]] = "unchanged" if unchanged else "running"
            found.label, found.done, found.total = "", 0, 0
        if line.strip() and not bar:
            found.lines.append(printable(line))
    if ended := outcome():
        last = "done" if ended == "finished" else ended
        found.stages = {name: last if state == "running" else state for name, state in found.stages.items()}
    found.lines = found.lines[-200:]
    return found


def validation_images() -> dict[int, list[Path]]:
    """Validation images by step: of the training that was opened last, else of the last results."""
    from customdiff.training.checkpoints import RUNS, RunFolder, last_opened

    runs = sorted((RunFolder(path) for path in RUNS.glob("*/")), key=last_opened)
    folders = [runs[-1].path / "validation"] if runs else []
    for folder in (*folders, Path("results/train/validation")):
        found: dict[int, list[Path]] = {}
        for path in sorted(folder.glob("step*-*.png")):
            found.setdefault(int(path.name[4:].partition("-")[0]), []).append(path)
        if found:
            return found
    return {}


def _holders() -> list[int]:
    """Processes that hold DVC's locks: that of the repository, and those of the files of a running stage."""
    pids = []
    try:
        entries = json.loads((LOCKS / "rwlock").read_text(encoding="utf-8"))
        pids += [each["pid"] for each in entries.get("write", {}).values()]
        pids += [each["pid"] for readers in entries.get("read", {}).values() for each in readers]
    except (OSError, ValueError):
        pass  # no stage is running, or DVC is writing the file
    try:
        with (LOCKS / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pids.append(int(file.read()))
    except (OSError, ValueError):
        pass
    return list(dict.fromkeys(pids))


def _log() -> str:
    return LOG.read_text(encoding="utf-8", errors="replace") if LOG.is_file() else ""


def _read() -> dict:
    try:
        return json.loads(RUN.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(run: dict) -> None:
    incoming = RUN.with_suffix(f".{os.getpid()}")
    incoming.write_text(json.dumps(run), encoding="utf-8")
    incoming.replace(RUN)


if __name__ == "__main__":
    main()
