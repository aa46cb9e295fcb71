"""Atomic writes of files and folders under a lock, hashes of files and code, and the project folder."""

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO

from customdiff.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where outputs are not locked
    fcntl = None  # type: ignore[assignment]

INCOMING = ".incoming"
LOCK_SECONDS = 20  # a stage whose `dvc` was killed ends within seconds
FULL = 1 << 20  # bytes
MODEL_FILES = (".safetensors", ".json", ".txt")
PACKAGE = Path(__file__).parent


def project_home() -> Path:
    """The project folder, for files that outlive a run; DVC runs queued experiments in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


@contextmanager
def atomic_directory(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends without an error.

    If the block raises or the process is killed, `folder` stays as it was. Temporary folders of killed processes are
    removed at the next call. Meanwhile the output is locked.

    Raises:
        UserError: another process is writing the folder, the folder is a link or a file, or the disk is full.
    """
    folder = Path(folder)
    if folder.is_symlink() or folder.is_file():
        raise UserError(f"{folder}: is a {'link' if folder.is_symlink() else 'file'}; remove it, or name a folder")
    with locked(folder):
        incoming = _beside(folder)
        incoming.mkdir()
        try:
            with _full_disk(incoming):
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
    """Yield a path; the file written there replaces `path` when the block ends without an error.

    Raises:
        UserError: another process is writing the file, or the disk is full.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    with locked(path):
        incoming = _beside(path)
        try:
            with _full_disk(path.parent):
                yield incoming
        except BaseException:
            incoming.unlink(missing_ok=True)
            raise
        with suppress(FileNotFoundError):
            shutil.copymode(path, incoming)
        incoming.replace(path)


@contextmanager
def work_directory(out: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside an output that is locked, for its intermediate files; removed at the end.

    The folder of a killed process is removed when the output is locked again.
    """
    folder = _beside(Path(out))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Hold the lock of an output, create its parent folder, and remove what killed processes left beside it.

    The lock is the hidden file `.<name>.lock` beside the output. The system releases it if the process is killed.

    Raises:
        UserError: another process holds the lock for longer than `LOCK_SECONDS`; names the process.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + LOCK_SECONDS
    while (file := _try_lock(lock)) is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: process {_holder(lock)} is writing it; wait until it has finished, or stop it with `kill`"
            )
        time.sleep(0.1)
    try:
        for leftover in path.parent.glob(f".{escape(path.name)}.{'[0-9a-f]' * 16}{INCOMING}"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _try_lock(lock: Path) -> IO[str] | None:
    """Take a lock; None if another process has it."""
    file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_ino != lock.stat().st_ino:  # another process has removed the file meanwhile
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        file.close()
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # some network file systems have no locks
            raise
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8") or "(unknown)"
    except OSError:
        return "(unknown)"


def _beside(path: Path) -> Path:
    """A new hidden path in the same folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}{INCOMING}")


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """Convert errors of libraries that do not name their cause, if the disk of `folder` is full."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free < FULL:
            raise UserError(f"{folder.parent}: no space left on the disk; free some and run again") from error
        raise


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


def model_hashes(folder: Path | str) -> dict[str, str]:
    """SHA-256 of each file in a model's folder that determines its output, by path: weights, configs, tokenizers.

    Empty if there is no such folder, as for the name of a model on the Hub.
    """
    folder = Path(folder)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in MODEL_FILES)
    shown = (path for path in paths if not any(part.startswith(".") for part in path.parts))
    return {path.as_posix(): sha256(folder / path) for path in shown}


def weights_hash(folder: Path | str) -> str:
    """Hash of the names and contents of the safetensors files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


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
