"""`customdiff new`: a new concept from photos."""

import difflib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customdiff import config
from customdiff.cli.preset import keep_backup
from customdiff.errors import UserError

if TYPE_CHECKING:
    from customdiff.new_concept.adding import Photos
    from customdiff.preparation.examples import Example
    from customdiff.sources.instance_images import Collected

EXAMPLES_OF_THE_REPOSITORY = tuple(Path("data/concepts") / name for name in ("cat", "teapot", "hat"))

EXAMPLES = """Examples:

\b
  customdiff new rex ~/photos/rex/*.jpg --class dog --only     learn Rex alone; then run `dvc repro`
  customdiff new rex ~/photos/rex --class dog                  learn Rex beside the concepts of params.yaml
  customdiff new rex ~/photos/rex.zip                          propose the class from the photos, and ask
  customdiff new rex /mnt/photos/rex --class dog --no-copy     leave the photos where they are
  customdiff new rex ~/photos/better/*.jpg --class dog --replace

A caption beside a photo (01.txt for 01.jpg, with {} for the subject) and its mask (01.mask.png) are copied with it.
"""


def new(
    name: Annotated[str, typer.Argument(help="Name of the concept: lower-case letters, digits, _ and -.")],
    photos: Annotated[
        list[Path], typer.Argument(metavar="PHOTOS", help="4 to 5 photos, or folders, or zip or tar archives.")
    ],
    class_words: Annotated[
        str | None, typer.Option("--class", help="Class of the subject, such as dog (default: proposed by CLIP).")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Modifier token (default: the first free one of <new1>, ...)")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Copy the photos to data/concepts/NAME, or name their folder.")
    ] = True,
    only: Annotated[bool, typer.Option("--only", help="Remove all other concepts from params.yaml.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the photos and the entry of this name.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Use the most probable class without asking.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet/--no-sheet", help="Show masks and captions as a picture.")] = True,
    path: Annotated[Path, typer.Option("--params", help="File to change; the old one is kept as .bak.")] = Path(
        "params.yaml"
    ),
) -> None:
    """Add a concept to params.yaml from photos of one subject.

    Checks the photos, copies them, writes the entry, and shows the mask and caption of each photo. Nothing is written
    if anything is wrong.
    """
    from customdiff.new_concept import adding, entry
    from customdiff.new_concept.params_file import ParamsFile

    entry.check_name(name)
    file = ParamsFile.read(path)
    params = file.params
    adding.check_is_new(name, params, copy=copy, replace=replace)
    with tempfile.TemporaryDirectory(prefix="customdiff-") as work:
        gathered = adding.gather(name, photos, params, Path(work), copy=copy)
        words = _class_of(gathered, params, class_words, yes=yes)
        token = token or adding.token_for(name, params, only=only)
        edited = entry.with_concept(file.text, name, entry.new_entry(gathered.path, token, words), only=only)
        changed = config.parse(edited, path)
        examples = adding.examples(gathered, changed.concepts[name], changed) if sheet else []
        file.check_is_current()
        written = adding.keep(name, gathered, examples)
        _report_photos(name, gathered)
        if written:
            _report_sheet(written, examples, gathered.checked)
    backup = keep_backup(path)
    file.write(edited)
    typer.echo(f"{path}: concepts.{name} is a {words} with modifier token {token}; the old file is kept as {backup}")
    typer.echo(f"validation prompts: {entry.validation_prompts_of(changed)}")
    _report_others(name, changed, set(params.concepts) - set(changed.concepts))
    typer.echo("next: dvc repro")


def _class_of(gathered: "Photos", params: config.Params, given: str | None, *, yes: bool) -> str:
    """The class that the user gave, or confirms among the proposals of CLIP."""
    from customdiff.new_concept.class_words import pool_words

    known = pool_words(params)
    words = _confirmed_class(gathered, params, yes=yes) if given is None else given
    words = " ".join(words.split())
    if not words:
        raise UserError("--class: is empty; give a word such as dog")
    if known and words not in known:
        near = difflib.get_close_matches(words, known, n=1)
        typer.echo(
            f"warning: the pool of class images has no {words!r}, and the base model may not know it; "
            + (f"did you mean {near[0]}?" if near else f"its subjects: {', '.join(known)}")
        )
    return words


def _confirmed_class(gathered: "Photos", params: config.Params, *, yes: bool) -> str:
    """The proposal of CLIP that the user confirms; a proposal alone can be wrong, however probable (docs)."""
    from customdiff.new_concept import adding

    name, guesses = adding.guesses(gathered, params)
    shown = ", ".join(f"{guess.word} ({guess.probability:.0%})" for guess in guesses[:3])
    if not (yes or _is_terminal()):
        raise UserError(f"--class: is needed; {name} proposes {shown}; give one of them, another word, or --yes")
    typer.echo(f"class of the subject, as {name} sees it: {shown}")
    return guesses[0].word if yes else typer.prompt("class", default=guesses[0].word)


def _is_terminal() -> bool:
    """Whether the user can be asked."""
    return sys.stdin.isatty()


def _report_sheet(sheet: Path, examples: "Sequence[Example]", checked: "Collected") -> None:
    typer.echo(f"masks and captions: {sheet}")
    for example, photo in zip(examples, checked.kept, strict=True):
        typer.echo(f"  {photo['source']}: {example.caption!r} ({'; '.join(example.notes)})")


def _report_photos(name: str, gathered: "Photos") -> None:
    place = f"copied to {gathered.path}" if gathered.copy else f"used in {gathered.path}, not copied"
    typer.echo(f"{name}: {len(gathered.checked.kept)} photos, {place}")
    for refused in gathered.checked.set_aside:
        typer.echo(f"  set aside: {refused.name}: {refused.reason}")
    for note in gathered.checked.notes:
        typer.echo(f"  warning: {note}")


def _report_others(name: str, params: config.Params, removed: set[str]) -> None:
    """What else params.yaml trains, and how to train the new concept alone."""
    if removed:
        typer.echo(f"removed: {', '.join(sorted(removed))}")
    others = {key: concept for key, concept in params.concepts.items() if key != name}
    if not others:
        return
    listed = ", ".join(f"{key} ({concept.modifier_token})" for key, concept in others.items())
    typer.echo(f"params.yaml also trains {listed}; all concepts share train.max_steps ({params.train.max_steps})")
    for key, concept in others.items():
        source = concept.source.path
        if source and not Path(source).exists():
            typer.echo(f"warning: concepts.{key}.source.path: {source} does not exist, so `dvc repro` would stop there")
        if source and (Path(source) in EXAMPLES_OF_THE_REPOSITORY or not Path(source).exists()):
            typer.echo(
                f"  to train {name} without it, remove concepts.{key} from params.yaml, or give --only --replace"
            )
