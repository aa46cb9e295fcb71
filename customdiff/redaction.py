"""Addresses without their secrets, for everything that is shown or logged."""

import re
from typing import Any

MASK = "***"
# The user part ends at the last @, because passwords may contain one; without a colon it has no / either.
_USER = re.compile(r"(://)(?:[^\s/?#]*|[^\s/?#:]*:[^\s?#]*)@")
_QUERY = re.compile(r"(://[^\s?#'\"<>]*)[?#][^\s'\"<>]*[^\s'\"<>:;,.]")
_DATABRICKS = re.compile(r"(databricks(?:-uc)?://)[^\s'\"]+")  # a profile, or a token


def redact(text: str) -> str:
    """Text in which each address has no user and password, and `***` for its query and fragment.

    Hosts, ports and paths are kept, so that the reader still recognizes the address. The query is masked as a whole:
    which of its parts are secret, such as `?token=`, depends on the server.
    """
    if "://" not in text:
        return text
    masked = _DATABRICKS.sub(rf"\1{MASK}", text)
    masked = _USER.sub(r"\1", masked)
    return _QUERY.sub(rf"\1?{MASK}", masked)


def redact_values(values: Any) -> Any:
    """Nested dicts and lists in which `redact` was applied to each string."""
    if isinstance(values, dict):
        return {key: redact_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact_values(value) for value in values]
    return redact(values) if isinstance(values, str) else values
