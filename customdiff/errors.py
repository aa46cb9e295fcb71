"""Mistakes that are the user's to mend, shown in one line and without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend. Its message names the key, file or value, and what would be right."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a `UserError` as one line on stderr and exit with status 1; let every other error through."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
