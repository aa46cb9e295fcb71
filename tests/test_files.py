"""Outputs are whole or not there at all, also after a kill."""

import hashlib
import subprocess
import sys

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
