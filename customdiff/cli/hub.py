"""`customdiff push`: an adapter onto the Hugging Face Hub."""

import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customdiff import config
from customdiff.errors import UserError

if TYPE_CHECKING:
    from customdiff.adapters.config import AdapterConfig
    from customdiff.publishing.model_card import Evaluation

ADAPTER, RESULTS = Path("models/adapter"), Path("results/evaluate")
LICENCES = "apache-2.0, cc-by-4.0, cc-by-nc-4.0, creativeml-openrail-m, other, ..."

EXAMPLES = """Examples:

\b
  customdiff push anna/grey-cat --license cc-by-4.0 --dry-run card     look at it first; nothing is sent
  customdiff push anna/grey-cat --license cc-by-4.0                    private; --public shows it to everybody
  customdiff push anna/grey-cat --license cc-by-4.0 --base-model anna/base --revision v2

Then, anywhere: customdiff sample "a <new1> cat" --adapter anna/grey-cat
"""


def push(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub; created where there is none.")],
    adapter: Annotated[Path, typer.Option(help="Folder of what was learned.")] = ADAPTER,
    license_: Annotated[
        str | None,
        typer.Option("--license", help=f"Of the adapter, as the Hub spells it: {LICENCES} Asked for where it lacks."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The very same base model on the Hub, where yours is a folder."),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; private if not said."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, created where there is none.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="What `evaluate` wrote of it; by default results/evaluate, for models/adapter.")
    ] = None,
    contact_sheet: Annotated[
        bool, typer.Option("--contact-sheet", help="Show the contact sheet too, and so your own pictures.")
    ] = False,
    with_bin: Annotated[bool, typer.Option("--with-bin", help="Pickles too, for programs that know no other.")] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write into this new folder what would go there; send nothing."),
    ] = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub: its files, a model card, images and figures, in one commit."""
    from customdiff.adapters.adapter import read_config
    from customdiff.files import atomic_directory
    from customdiff.models.base import quiet
    from customdiff.publishing import hub, model_card

    hub.check_repository(repository, "OWNER/NAME")
    if base_model is not None:
        hub.check_repository(base_model, "--base-model", "owner/name[@revision]")
    if dry_run is not None and dry_run.exists():
        raise UserError(f"--dry-run: {dry_run} is there already; name a new folder")
    adapter_config = read_config(adapter)
    if dry_run is None:
        hub.require_token()
    license_ = _license(license_)
    quiet()
    evaluation = _evaluation(adapter, results, adapter_config)
    base = model_card.published(adapter_config, adapter, base_model).base.model
    if base.startswith("./"):
        _note(
            f"nobody else can load the base model {base} by that name; if it is on the Hub too, name it by --base-model"
        )
    if contact_sheet and (evaluation is None or evaluation.sheet is None):
        raise UserError("--contact-sheet: there is none in the results; `dvc repro` draws it")

    with (
        tempfile.TemporaryDirectory(prefix="customdiff-") as work,
        atomic_directory(dry_run or Path(work, "out")) as out,
    ):
        hub.build(
            adapter,
            out,
            repository,
            license=license_,
            base_model=base_model,
            revision=revision,
            evaluation=evaluation,
            with_sheet=contact_sheet,
            with_bin=with_bin,
        )
        files = [path for path in out.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        if dry_run is not None:
            typer.echo(f"{len(files)} files, {size:.1f} MB, in {dry_run}; nothing was sent")
            return
        pushed, remarks = hub.push(out, repository, private=private, revision=revision, message=message)
    for remark in remarks:
        _note(f"the Hub says: {remark}")
    what = f"commit {pushed.commit[:8]}, {len(files)} files, {size:.1f} MB" if pushed.commit else "nothing has changed"
    typer.echo(f"{pushed.url} ({'private' if pushed.private else 'public'}): {what}")


def _license(given: str | None) -> str:
    """The licence's identifier, asked for on a terminal; whoever publishes chooses it."""
    if given is None and on_terminal():
        typer.echo("The licence is yours to choose; that of the base model holds beside it.", err=True)
        given = typer.prompt(f"Licence ({LICENCES})", err=True)
    if given is None:
        raise UserError(f"--license: is yours to choose and never guessed; one of {LICENCES}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise UserError(f"--license: {given!r} is no identifier as the Hub spells it; such as {LICENCES}")
    return given


def _evaluation(adapter: Path, results: Path | None, adapter_config: "AdapterConfig") -> "Evaluation | None":
    """What `evaluate` wrote of this adapter: asked for, or found in the pipeline's own places and not older."""
    from customdiff.publishing.model_card import read_evaluation

    if results is not None:
        return read_evaluation(results, adapter_config, _settings(results))
    if adapter.resolve() != ADAPTER.resolve() or not (RESULTS / "metrics.json").is_file():
        _note("the card has no figures and no images; --results names the folder that `evaluate` wrote of this adapter")
        return None
    if _written(RESULTS / "metrics.json") < _written(adapter / "adapter.json"):
        _note(f"{RESULTS} is older than the adapter and left out; --results {RESULTS} shows it all the same")
        return None
    return read_evaluation(RESULTS, adapter_config, _settings(RESULTS))


def _settings(results: Path) -> config.Evaluate | None:
    """How the images of the pipeline's own results were drawn, where params.yaml was not edited since."""
    path = Path("params.yaml")
    is_own = results.resolve() == RESULTS.resolve() and (results / "metrics.json").is_file() and path.is_file()
    if not is_own or _written(path) > _written(results / "metrics.json"):
        return None
    try:
        return config.load(path).evaluate
    except UserError:
        return None


def _written(path: Path) -> float:
    """When a file was last written, in seconds since 1970."""
    return path.stat().st_mtime


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def on_terminal() -> bool:
    """Whether there is somebody to ask."""
    return sys.stdin.isatty()
