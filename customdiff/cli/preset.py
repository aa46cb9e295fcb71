"""`customdiff preset` and `customdiff check`: install and validate params.yaml files."""

import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.errors import UserError
from customdiff.files import atomic_file
from customdiff.new_concept import presets

EXAMPLES = """Examples:

\b
  customdiff preset                       list presets
  customdiff preset sd14-cat              print a preset
  customdiff preset sd14-cat --install    write it to params.yaml; then run `dvc repro`
"""


def preset(
    name: Annotated[str | None, typer.Argument(help="Name of a preset; omit it to list all.")] = None,
    install: Annotated[bool, typer.Option("--install", help="Write the preset to params.yaml.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an edited params.yaml, which is kept as .bak.")
    ] = False,
) -> None:
    """List, print or install presets of params.yaml."""
    known = presets.presets()
    if not known:
        raise UserError(f"{presets.PRESETS}: contains no presets; install customdiff again")
    if name is None:
        width = max(map(len, known)) + 2
        for preset_name, path in known.items():
            line = f"{preset_name:<{width}}{presets.first_sentence(path)}"
            typer.echo(textwrap.fill(line, 100, subsequent_indent=" " * width))
        return
    if name not in known:
        raise UserError(f"NAME: unknown preset {name}; use one of {', '.join(known)}")
    if install:
        typer.echo(install_preset(known[name], Path("params.yaml"), known.values(), force=force))
    else:
        typer.echo(known[name].read_text(encoding="utf-8"), nl=False)


def check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to check.")] = Path("params.yaml"),
) -> None:
    """Check params.yaml for unknown keys, wrong types and values out of range, and the holdout photos that it names.

    Paths in the file are relative to the current folder; holdout photos are only checked for a file in it.
    """
    params = config.load(path)
    if path.resolve().parent == Path.cwd():
        from customdiff.sources.holdout import check_source

        for name, concept in params.concepts.items():
            check_source(name, concept, params.download)
    concepts = ", ".join(f"{name} ({concept.modifier_token})" for name, concept in params.concepts.items())
    typer.echo(f"{path}: valid; trains {concepts} on {params.base.model} for {params.train.max_steps} steps")


def install_preset(source: Path, target: Path, known: Iterable[Path], *, force: bool = False) -> str:
    """Write a preset to `target`, keep a different old file as a backup, and return a message.

    Raises:
        UserError: `target` differs from all presets, so a user has edited it, and `force` is False.
    """
    config.load(source)
    new = source.read_bytes()
    if not target.exists():
        kept = ""
    elif target.read_bytes() == new:
        return f"{target} is already preset {source.stem}"
    elif not force and target.read_bytes() not in [path.read_bytes() for path in known]:
        raise UserError(f"{target}: edited by you; --force replaces it and keeps a copy in {_free_backup(target)}")
    else:
        kept = f"; the old file is kept as {keep_backup(target)}"
    with atomic_file(target) as incoming:
        incoming.write_bytes(new)
    return f"{target} is now preset {source.stem}{kept}"


def keep_backup(target: Path) -> Path:
    """Copy a file to its first free backup name, and return that."""
    backup = _free_backup(target)
    shutil.copy2(target, backup)
    return backup


def _free_backup(target: Path) -> Path:
    """`params.yaml.bak`, or `.bak2`, `.bak3` and so on if it exists."""
    first = target.with_name(f"{target.name}.bak")
    numbered = (first.with_name(f"{first.name}{number}") for number in range(2, 1000))
    return first if not first.exists() else next(path for path in numbered if not path.exists())
