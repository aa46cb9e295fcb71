"""`dvc repro` as the page runs it, with a small program in DVC's place: start, stop, find again, and its log."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from customdiff.app import pipeline
from customdiff.errors import UserError

# Says a line, waits for a signal or for the file `end`, and says how it ended.
PROGRAM = """
import pathlib, sys, time
print("Running stage 'train':", flush=True)
try:
    while not pathlib.Path("end").exists():
        time.sleep(0.02)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
sys.exit(int(pathlib.Path("end").read_text()))
"""
LOG = """\
Running stage 'inputs':
> python stages/inputs.py
Updating lock file 'dvc.lock'

Stage 'download-data@tom' didn't change, skipping
Running stage 'train':
> python stages/train.py
train:   0%|          | 0/30 [00:00<?, ?step/s]\rtrain:  17%|#6        | 5/30 [00:03<00:17,  1.40step/s]\r\
train:  33%|###3      | 10/30 [00:07<00:14,  1.40step/s, images_s=5.5, loss=0.0830]\r\
train:  67%|######6   | 20/30 [00:14<00:07,  1.41step/s, images_s=5.6, loss=0.0714]\r"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder in which a program stands for DVC."""
    (tmp_path / "dvc.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")  # `python -m dvc` finds it first
    yield tmp_path
    if process := pipeline.running():
        kill(process)


def kill(process: psutil.Process) -> None:
    """Kill a run and the program in it."""
    for each in [process, *process.children(recursive=True)]:
        each.kill()


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def started() -> bool:
    return "train" in pipeline.progress().stages


def test_a_run_is_found_again_and_ends(project):
    assert (pipeline.outcome(), pipeline.running()) == ("", None)
    pipeline.start()
    wait_until(started)
    assert pipeline.running().pid == json.loads(pipeline.RUN.read_text())["pid"]
    with pytest.raises(UserError, match="running already"):
        pipeline.start()
    assert pipeline.progress().stages == {"train": "running"}
    (project / "end").write_text("0")
    wait_until(lambda: pipeline.running() is None)
    assert pipeline.outcome() == "finished"
    assert pipeline.progress().stages == {"train": "done"}


def test_stop_is_ctrl_c_and_run_starts_again(project):
    pipeline.start()
    wait_until(started)
    pipeline.stop()
    wait_until(lambda: pipeline.running() is None)
    assert pipeline.progress().lines[-1] == "interrupted"
    assert pipeline.outcome() == "stopped"
    pipeline.start()
    wait_until(started)
    assert pipeline.running()
    assert pipeline.outcome() == ""


def test_a_failure_and_a_kill_are_told_apart(project):
    pipeline.start()
    wait_until(started)
    (project / "end").write_text("1")
    wait_until(lambda: pipeline.running() is None)
    assert (pipeline.outcome(), pipeline.progress().stages) == ("failed", {"train": "failed"})
    (project / "end").unlink()
    pipeline.start()
    wait_until(started)
    kill(pipeline.running())
    wait_until(lambda: pipeline.running() is None)
    assert pipeline.outcome() == "killed"


def test_it_outlives_the_program_that_started_it(project):
    code = "from customdiff.app import pipeline; pipeline.start()"
    subprocess.run([sys.executable, "-c", code], check=True)
    wait_until(started)
    assert pipeline.running()


def test_a_number_that_another_program_has_got_is_no_run(project):
    pipeline.FOLDER.mkdir()
    pipeline.RUN.write_text(json.dumps({"pid": psutil.Process().pid, "started": 1.0, "status": None}))
    assert pipeline.running() is None
    pipeline.stop()  # kills nobody


@pytest.mark.parametrize("lock", ["stage", "repository"])
def test_a_run_in_another_terminal_is_named(project, lock):
    folder = project / ".dvc/tmp"
    folder.mkdir(parents=True)
    held = "import zc.lockfile; lock = zc.lockfile.LockFile('.dvc/tmp/lock')" if lock == "repository" else ""
    (project / "stand_in.py").write_text(f"{held}\nprint('held', flush=True)\nimport time\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, "stand_in.py", "dvc", "repro"], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            if lock == "stage":
                info = {"pid": other.pid, "cmd": "dvc repro"}
                (folder / "rwlock").write_text(json.dumps({"write": {"/x": info}, "read": {"/y": [info]}}))
            assert pipeline.foreign().pid == other.pid
            with pytest.raises(UserError, match=rf"process {other.pid} \(.*dvc repro\) .* another terminal"):
                pipeline.start()
        finally:
            other.kill()
    assert pipeline.foreign() is None
    pipeline.start()


def test_what_the_log_says(project):
    pipeline.FOLDER.mkdir()
    pipeline.LOG.write_text(LOG)
    found = pipeline.progress()
    assert found.stages == {"inputs": "done", "download-data@tom": "unchanged", "train": "running"}
    assert (found.label, found.done, found.total) == ("train", 20, 30)
    assert found.losses == {10: 0.083, 20: 0.0714}
    assert found.lines[-1] == "> python stages/train.py"


def test_validation_images_are_those_of_the_training_that_was_opened_last(project):
    for run, step in (("a", 0), ("a", 10), ("b", 0)):
        path = project / f".checkpoints/{run}/validation/step{step:06d}-prompt0-0.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (identity := path.parent.parent / "identity.json").touch()
        os.utime(identity, (1, 2 if run == "b" else 1))
    ((path,),) = pipeline.validation_images().values()
    assert path.parts[1] == "b"
    (project / ".checkpoints/a/identity.json").touch()
    assert sorted(pipeline.validation_images()) == [0, 10]
