"""Outputs are whole or not there at all, also after a kill."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from customdiff import files
from customdiff.errors import UserError, one_line_errors


def test_a_folder_is_replaced_only_at_the_end(tmp_path):
    folder = tmp_path / "out"
    with files.atomic_directory(folder) as incoming:
        (incoming / "a").write_text("first")
        assert not folder.exists()
    with pytest.raises(ZeroDivisionError), files.atomic_directory(folder) as incoming:
        (incoming / "b").write_text("second")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["a"]
    with files.atomic_directory(folder) as incoming:
        (incoming / "c").write_text("third")
    assert [path.name for path in folder.iterdir()] == ["c"]


def test_a_killed_process_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    with files.atomic_directory(folder) as incoming:
        (incoming / "a").write_text("first")
    killed = (
        "import os, signal, sys; from customdiff import files\n"
        "with files.atomic_directory(sys.argv[1]) as incoming:\n"
        "    (incoming / 'b').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(folder)]).returncode == -9
    assert [path.name for path in folder.iterdir()] == ["a"]
    with files.atomic_directory(folder) as incoming:
        assert list(incoming.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_the_same_output(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    hold = (
        "import sys, time; from customdiff import files\n"
        "with files.atomic_directory(sys.argv[1]): print('ready', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "out")], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"out: process {other.pid} is writing it"), files.locked(tmp_path / "out"):
            pass
        other.kill()
    with files.atomic_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="out: is a link"), files.atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("problem", [OSError(errno.ENOSPC, "full", "a/b"), OSError(errno.EACCES, "denied", "a/b")])
def test_the_state_of_the_machine_is_one_line(capsys, problem):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise problem
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: 'a/b': ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(capsys, number):
    before = signal.signal(number, signal.SIG_DFL)  # a shell lets jobs in the background ignore SIGINT
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors():
            os.kill(os.getpid(), number)
            time.sleep(5)
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.count("\n") == 1


def test_a_stage_ends_with_dvc(tmp_path):
    """The stage's parent, in the place of dvc, is killed; the stage gets a SIGTERM and ends."""
    stage = (
        "import time; from customdiff.errors import one_line_errors\n"
        "with one_line_errors(): print(1, flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stage!r}])"
    environment = os.environ | {"DVC_STAGE": "train"}
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as dvc:
        dvc.stdout.readline()
        dvc.kill()
        assert b"interrupted by SIGTERM" in dvc.stderr.read()


def test_a_file_is_replaced_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "out.txt"
    with files.atomic_file(path) as incoming:
        incoming.write_text("first")
    with pytest.raises(ZeroDivisionError), files.atomic_file(path) as incoming:
        incoming.write_text("second")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert [each.name for each in path.parent.iterdir()] == ["out.txt"]
    assert files.sha256(path) == hashlib.sha256(b"first").hexdigest()


def test_a_replaced_file_keeps_its_mode_and_a_link_its_target(tmp_path):
    secret, link = tmp_path / "params.yaml", tmp_path / "link.yaml"
    secret.write_text("old")
    secret.chmod(0o600)
    link.symlink_to(secret)
    with files.atomic_file(link) as incoming:
        incoming.write_text("new")
    assert link.is_symlink()
    assert secret.read_text() == "new"
    assert secret.stat().st_mode & 0o777 == 0o600


def test_user_errors_are_one_line_and_others_have_a_traceback(capsys):
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise UserError("train.max_steps: must be above 0")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: train.max_steps: must be above 0\n"
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError


def test_existing_folders_are_not_replaced(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    files.check_free(own)
    files.check_free(tmp_path / "new", "table.csv")
    (own / "thesis.txt").touch()
    for marker in (None, "table.csv"):
        with pytest.raises(UserError, match=r"--out: .*own exists already"):
            files.check_free(own, marker)
    (own / "table.csv").touch()
    files.check_free(own, "table.csv")
    with pytest.raises(UserError):
        files.check_free(own / "thesis.txt")
