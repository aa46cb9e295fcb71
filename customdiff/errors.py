"""Errors that the user can fix, shown in one line without a traceback."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from customdiff import interrupts
from customdiff.redaction import redact

# Control characters but the line feed, surrogates (bytes of a name that is not UTF-8), and changes of text direction.
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The machine's state, not a mistake in the code: what to do about it by error number.
MACHINE = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "the file system is read-only; use another folder",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOTDIR: "it is a file; name a folder",
    errno.ELOOP: "it is a link to itself; remove it",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "check the disk",
}


class UserError(Exception):
    """An error that the user can fix; the message names the key, file or value and what would be right."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError`, a full disk and the like, or an interruption in one line, and exit.

    The exit status is 1, or 128 plus the signal's number. Secrets in addresses are masked. Other exceptions propagate.
    """
    interrupts.end_with_dvc()
    try:
        with interrupts.as_exceptions():
            yield
    except UserError as error:
        _exit(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in MACHINE:
            raise
        name = f"{os.fspath(error.filename)!r}: " if error.filename else ""
        _exit(f"error: {name}{os.strerror(error.errno).lower()}; {MACHINE[error.errno]}", 1)
    except interrupts.Interrupted as signal:
        _exit(f"interrupted by {signal}; run the same command again to continue", 128 + signal.number)


def _exit(message: str, status: int) -> None:
    print(printable(redact(message)), file=sys.stderr)
    sys.exit(status)


def printable(text: str) -> str:
    """Text without control characters, undecodable bytes and changes of direction; line breaks are kept."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
