"""`customdiff push`: publish an adapter on the Hugging Face Hub."""

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
LICENSES = "apache-2.0, cc-by-4.0, cc-by-nc-4.0, creativeml-openrail-m, other, ..."

EXAMPLES = """Examples:

\b
  customdiff push anna/grey-cat --license cc-by-4.0 --dry-run card     write what would be sent to card/
  customdiff push anna/grey-cat --license cc-by-4.0                    private; --public makes it visible to everyone
  customdiff push anna/grey-cat --license cc-by-4.0 --base-model anna/base --revision v2

Then, on any machine: customdiff sample "a <new1> cat" --adapter anna/grey-cat
"""


Repository = Annotated[
    str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; created if it does not exist.")
]
AdapterFolder = Annotated[Path, typer.Option(help="Folder of the adapter.")]
License = Annotated[
    str | None, typer.Option("--license", help=f"License of the adapter, an identifier of the Hub: {LICENSES}")
]
BaseModel = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Repository of the same base model, if the adapter names a folder."),
]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Visibility of a new repository (default: private).")
]
Revision = Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")]
Message = Annotated[str | None, typer.Option(help="Commit message.")]
Results = Annotated[
    Path | None,
    typer.Option(help="Output folder of `evaluate` for this adapter; for models/adapter, results/evaluate by default."),
]
ContactSheet = Annotated[
    bool, typer.Option("--contact-sheet", help="Publish the contact sheet, which shows your instance images.")
]
WithBin = Annotated[
    bool, typer.Option("--with-bin", help="Also publish pickle files (.bin), for programs that need them.")
]
DryRun = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Write the files to this new folder instead of sending them.")
]


def push(
    repository: Repository,
    adapter: AdapterFolder = ADAPTER,
    license_: License = None,
    base_model: BaseModel = None,
    private: Private = None,
    revision: Revision = None,
    message: Message = None,
    results: Results = None,
    contact_sheet: ContactSheet = False,
    with_bin: WithBin = False,
    dry_run: DryRun = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub: its files, a model card, images and figures, in one commit."""
    from customdiff.adapters.config import read_config
    from customdiff.files import atomic_directory
    from customdiff.models.base import quiet
    from customdiff.publishing import hub

    hub.check_repository(repository, "OWNER/NAME")
    if base_model is not None:
        hub.check_repository(base_model, "--base-model", "owner/name[@revision]")
    if dry_run is not None and dry_run.exists():
        raise UserError(f"--dry-run: {dry_run} exists already; name a new folder")
    adapter_config = read_config(adapter)
    if dry_run is None:
        hub.require_token()
    license_ = _license(license_)
    quiet()
    _note_local_base(adapter, adapter_config, base_model)
    evaluation = _evaluation(adapter, results, adapter_config, contact_sheet)
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
            with_bin=with_bin,
        )
        files = [path for path in out.rglob("*") if path.is_file()]
        summary = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
        if dry_run is not None:
            typer.echo(f"{summary}, in {dry_run}; nothing was sent")
            return
        pushed = hub.push(out, repository, private=private, revision=revision, message=message)
    done = f"commit {pushed.commit[:8]}, {summary}" if pushed.commit else "nothing has changed"
    typer.echo(f"{pushed.url} ({'private' if pushed.private else 'public'}): {done}")


def _note_local_base(adapter: Path, adapter_config: "AdapterConfig", base_model: str | None) -> None:
    """Tell the user if others cannot load the base model by the name that is published."""
    from customdiff.publishing.model_card import published

    name = published(adapter_config, adapter, base_model).base.model
    if name.startswith("./"):
        _note(f"others cannot load the base model {name}; if it is on the Hub, name it with --base-model")


def _license(given: str | None) -> str:
    """The license's identifier; asked for if it is missing and there is a terminal."""
    if given is None and on_terminal():
        typer.echo("Choose a license for the adapter. The license of the base model applies too.", err=True)
        given = typer.prompt(f"License ({LICENSES})", err=True)
    if given is None:
        raise UserError(f"--license: is required; choose one, such as {LICENSES}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise UserError(f"--license: {given!r} is not an identifier of the Hub, such as {LICENSES}")
    return given


def _evaluation(
    adapter: Path, results: Path | None, adapter_config: "AdapterConfig", with_sheet: bool
) -> "Evaluation | None":
    """The evaluation of this adapter: in `results`, or the pipeline's own if it is not older than the adapter."""
    from customdiff.publishing.model_card import read_evaluation

    if results is None and (problem := _no_evaluation(adapter)):
        if with_sheet:
            raise UserError(f"--contact-sheet: {problem}")
        _note(f"the model card has no figures and no images: {problem}")
        return None
    folder = results or RESULTS
    return read_evaluation(folder, adapter_config, _settings(folder), with_sheet=with_sheet)


def _no_evaluation(adapter: Path) -> str | None:
    """Why the pipeline's own evaluation is not published with an adapter; None: it is."""
    if adapter.resolve() != ADAPTER.resolve() or not (RESULTS / "metrics.json").is_file():
        return "give the output folder of `evaluate` for this adapter with --results"
    if _written(RESULTS / "metrics.json") < _written(adapter / "adapter.json"):
        return f"{RESULTS} is older than the adapter; to publish it anyway, add --results {RESULTS}"
    return None


def _settings(results: Path) -> config.Evaluate | None:
    """How the images of the pipeline's own results were generated, if params.yaml was not edited since."""
    path = Path("params.yaml")
    is_own = results.resolve() == RESULTS.resolve() and (results / "metrics.json").is_file() and path.is_file()
    if not is_own or _written(path) > _written(results / "metrics.json"):
        return None
    try:
        return config.load(path).evaluate
    except UserError:
        return None


def _written(path: Path) -> float:
    """Modification time in seconds since 1970."""
    return path.stat().st_mtime


def _note(text: str) -> None:
    typer.echo(f"note: {text}", err=True)


def on_terminal() -> bool:
    """Whether the user can be asked."""
    return sys.stdin.isatty()
