"""Atomic writes of files and folders, hashes of files and code, and the project folder."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from customdiff.errors import UserError

INCOMING = ".incoming"
PACKAGE = Path(__file__).parent


def project_home() -> Path:
    """The project folder, for files that outlive a run; DVC runs queued experiments in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


@contextmanager
def atomic_directory(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends without an error.

    If the block raises or the process is killed, `folder` stays as it was. The next call removes the temporary folder
    of a killed process. Two processes use different temporary folders; the last to finish wins.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    incoming = _beside(folder)
    incoming.mkdir()
    try:
        yield incoming
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    replaced = _beside(folder)
    if folder.exists():
        folder.rename(replaced)
    incoming.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a path; the file written there replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    incoming = _beside(path)
    try:
        yield incoming
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    incoming.replace(path)


def _beside(path: Path) -> Path:
    """A new hidden path in the same folder, with the id of this process in its name."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{INCOMING}")


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files and folders of processes that no longer run."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*-*{INCOMING}"):
        pid = leftover.name.removeprefix(f".{path.name}.").partition("-")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_free(out: Path, marker: str | None = None) -> None:
    """Check that an output folder is missing or empty, so that no user's work is overwritten.

    Args:
        out: value of --out.
        marker: file that identifies an earlier result, which may be replaced.

    Raises:
        UserError: the folder is not empty.
    """
    replaceable = marker is not None and (out / marker).is_file()
    if not replaceable and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"--out: {out} exists already; name a new folder, or remove it first")


def sha256(path: Path | str) -> str:
    """SHA-256 of a file, in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_hash(*parts: str) -> str:
    """Hash of parts of this library's code, for caches that a change of the code must invalidate.

    Args:
        parts: packages or modules below `customdiff/`, such as `models` or `adapters/adapter.py`.
    """
    digest = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
