"""Errors of huggingface_hub and of the network as one line without tokens."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    DeviceCodeError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the httpx that huggingface_hub uses
    LocalEntryNotFoundError,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from customdiff.errors import UserError
from customdiff.redaction import redact

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# OSError includes the file system, connections, hf_xet, and huggingface_hub's own offline and cache errors.
LIBRARY_ERRORS = (HTTPError, OSError, EntryNotFoundError, HFValidationError, OIDCError, DeviceCodeError)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Convert errors of huggingface_hub and of the network to a `UserError`; other exceptions pass through.

    Args:
        what: beginning of the message, such as the repository's name.
    """
    try:
        yield
    except (*LIBRARY_ERRORS, RuntimeError) as raised:
        # huggingface_hub raises a RuntimeError from the server's error if the upload of a large file fails
        error = raised.__cause__ if isinstance(raised, RuntimeError) else raised
        if not isinstance(error, LIBRARY_ERRORS):
            raise
        said = (error.server_message if isinstance(error, HfHubHTTPError) else None) or str(error)
        # `from None`: the server's answer may quote a token, and a traceback would print it
        raise UserError(redacted(f"{what}: {type(error).__name__}: {said}; {_advice(error)}")) from None


def _advice(error: Exception) -> str:
    """What the user can do about an error of huggingface_hub."""
    if isinstance(error, GatedRepoError):
        return f"accept its terms on the Hub, then {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "name an existing branch, tag or commit after @"
    if isinstance(error, RepositoryNotFoundError):
        return f"check the name; if it is private, {LOG_IN}"
    if isinstance(error, HFValidationError):
        return "name a repository as owner/name"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"check the owner's name, and {LOG_IN}; the token needs write access"
        return f"the HTTP status is {status}" + ("; try again later" if status == 429 or status >= 500 else "")
    if isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError):
        return "check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return "check the Hub's cache and your login"


def redacted(text: str) -> str:
    """A text on one line, without tokens, and without the secrets of an address."""
    line = " ".join(text.split())
    for token in tokens():
        line = line.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}|(?<=Bearer )\S+", "***", redact(line))[:500]


def tokens() -> set[str]:
    """Every token that could be sent."""
    try:
        found = get_token()
    except LIBRARY_ERRORS:  # a login that expired and cannot be renewed
        found = None
    known = {found, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    return {token.strip() for token in known if token and token.strip()}
