"""Errors that the user can fix, shown in one line without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; the message names the key, file or value and what would be right."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` on stderr and exit with status 1; other exceptions propagate."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
