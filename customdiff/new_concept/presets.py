"""Presets of params.yaml that come with the library."""

import re
from itertools import takewhile
from pathlib import Path

PRESETS = Path(__file__).resolve().parent.parent / "presets"


def presets() -> dict[str, Path]:
    """The presets by name, in alphabetical order."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def first_sentence(path: Path) -> str:
    """First sentence of the comment at the top of a preset."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment)[0]
