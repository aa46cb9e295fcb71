"""Write outputs whole or not at all: beside their place first, then renamed into it; and where the project lies."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from customdiff.errors import UserError

INCOMING = ".incoming"


def project_home() -> Path:
    """The project's folder, for what outlives a run. DVC runs a queued experiment in a copy, which it removes."""
    return Path(os.environ.get("DVC_ROOT") or ".").resolve()


@contextmanager
def atomic_directory(folder: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that replaces it when the block ends without an error.

    A block that raises, or a process that is killed, leaves whatever stood at `folder` before.
    What a killed process left beside it is cleared by the next call.
    """
    folder = Path(folder)
    incoming = folder.with_name(f"{folder.name}{INCOMING}")
    shutil.rmtree(incoming, ignore_errors=True)
    incoming.mkdir(parents=True)
    try:
        yield incoming
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    incoming.rename(folder)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a path beside `path`; the file written there takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    incoming = path.with_name(f"{path.name}{INCOMING}")
    try:
        yield incoming
    except BaseException:
        incoming.unlink(missing_ok=True)
        raise
    incoming.replace(path)


def check_free(out: Path, marker: str | None = None) -> None:
    """Refuse a folder for results that something lies in: it is somebody's work.

    Args:
        out: what the user gave as --out.
        marker: a file that tells an earlier result, which may be replaced, from anything else.

    Raises:
        UserError: names the folder.
    """
    replaceable = marker is not None and (out / marker).is_file()
    if not replaceable and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"--out: {out} is there already; name a new folder, or remove it first")


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
