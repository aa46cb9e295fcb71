"""`customdiff preset` and `customdiff check`: params.yaml files, ready ones and the user's own."""

import re
import shutil
import textwrap
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.errors import UserError
from customdiff.files import atomic_file

PRESETS = Path(__file__).resolve().parent.parent / "presets"

EXAMPLES = """Examples:

\b
  customdiff preset                       list them
  customdiff preset sd14-cat              print one
  customdiff preset sd14-cat --install    make it params.yaml; then `dvc repro`
"""


def preset(
    name: Annotated[str | None, typer.Argument(help="Which one; none: list them.")] = None,
    install: Annotated[bool, typer.Option("--install", help="Write it to params.yaml in this folder.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even where params.yaml has been edited; kept as .bak.")
    ] = False,
) -> None:
    """List, print or install ready params.yaml files."""
    known = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if not known:
        raise UserError(
            f"{PRESETS}: holds no presets; run in a checkout of the project, installed with `pip install -e`"
        )
    if name is None:
        width = max(map(len, known)) + 2
        for each, path in known.items():
            typer.echo(textwrap.fill(f"{each:<{width}}{_first_sentence(path)}", 100, subsequent_indent=" " * width))
        return
    if name not in known:
        raise UserError(f"preset: there is no {name}; use one of {', '.join(known)}")
    if install:
        typer.echo(install_preset(known[name], Path("params.yaml"), known.values(), force=force))
    else:
        typer.echo(known[name].read_text(encoding="utf-8"), nl=False)


def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to check.")] = Path("params.yaml"),
) -> None:
    """Check params.yaml: every unknown key, wrong type and value out of range, before any work starts."""
    params = config.load(path)
    concepts = ", ".join(f"{name} ({concept.modifier_token})" for name, concept in params.concepts.items())
    typer.echo(f"{path}: good. Learns {concepts} on {params.base.model} in {params.train.max_steps} steps.")


def install_preset(source: Path, target: Path, presets: Iterable[Path], *, force: bool = False) -> str:
    """Write a preset to `target`, and say in a line what was done. Nothing is lost: an old file is kept beside it.

    Raises:
        UserError: `target` is no preset as it came, so somebody's work, and `force` is not given.
    """
    config.load(source)
    new = source.read_bytes()
    if not target.exists():
        kept = ""
    elif target.read_bytes() == new:
        return f"{target} is {source.stem} already"
    elif not force and target.read_bytes() not in [path.read_bytes() for path in presets]:
        raise UserError(f"{target}: has been edited; --force replaces it and keeps it as {_free_backup(target)}")
    else:
        backup = _free_backup(target)
        shutil.copy2(target, backup)
        kept = f"; the old one is kept as {backup}"
    with atomic_file(target) as incoming:
        incoming.write_bytes(new)
    return f"{target} is {source.stem} now{kept}"


def _free_backup(target: Path) -> Path:
    """`params.yaml.bak`, or `.bak2`, `.bak3` where that is taken."""
    first = target.with_name(f"{target.name}.bak")
    taken = (first.with_name(f"{first.name}{number}") for number in range(2, 1000))
    return first if not first.exists() else next(path for path in taken if not path.exists())


def _first_sentence(path: Path) -> str:
    """Of the comment that a preset begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.)\s", comment)[0]
