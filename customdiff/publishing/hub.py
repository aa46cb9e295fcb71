"""Publish an adapter on the Hugging Face Hub, and fetch adapters from it.

Repositories are untrusted. Only adapter.json, README.md and the safetensors files that adapter.json names are
downloaded, up to a size limit; a pickle file is never downloaded. What is published is written again from what
`adapter.read` returned, and is searched for paths and secrets of this machine before the upload.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from math import inf
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, cached_assets_path, constants, get_token, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.repocard import metadata_load
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from customdiff.adapters import adapter, formats
from customdiff.adapters.adapter import WEIGHTS, Adapter
from customdiff.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from customdiff.errors import UserError
from customdiff.images import save_sheet
from customdiff.models import methods
from customdiff.publishing import model_card
from customdiff.publishing.hub_errors import LOG_IN, library_errors, redacted, tokens
from customdiff.publishing.model_card import Evaluation

README = "README.md"
SECRETS = [f"MLFLOW_TRACKING_{name}" for name in ("URI", "PASSWORD", "TOKEN")]  # variables
PIPELINE_ADAPTER = "models/adapter"  # output of `dvc repro`; never a repository, even if the folder is missing
AT_REVISION = r"(@[\w./-]+)?"
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*" + AT_REVISION
MAX_BYTES, MAX_TEXT_BYTES = 4_000_000_000, 1_000_000

# The files that `push` writes, besides README.md and adapter.json; those of an earlier push are removed.
PUBLISHED = [
    f"{stem}.{suffix}"
    for stem in (WEIGHTS, adapter.LORA_WEIGHTS, adapter.COMPRESSED_WEIGHTS, "<*>")
    for suffix in ("safetensors", "bin")
] + ["images/*.png", "contact_sheet.jpg", "metrics.json"]


@dataclass(frozen=True)
class Pushed:
    """Result of `push`: the repository's address, whether it is private, and the commit, None if nothing changed."""

    url: str
    private: bool
    commit: str | None


def resolve(source: str | Path, *, base_model: str | None = None) -> Path:
    """The folder of an adapter, downloaded into the Hub's cache if `source` names a repository.

    Args:
        source: a folder; a str that is not an existing folder may also be owner/name[@revision]. A Path is a folder.
        base_model: for a repository of diffusers' training script, used instead of the base model in its model card.

    Raises:
        UserError: the repository cannot be reached or read, or has no adapter that can be read without pickle.
    """
    if not names_repository(source):
        return Path(source)
    repo, _, revision = str(source).partition("@")
    with library_errors(f"{source}: not a folder here, and on the Hub"):
        sizes = _sizes(repo, revision or None)
        folder = _fetch(repo, revision or None, [CONFIG_FILE, README], sizes)
        if not (folder / CONFIG_FILE).is_file():
            return _from_diffusers(repo, folder, sizes, base_model)
        with _invalid(repo, f"{CONFIG_FILE} is damaged or of another program; report it to the author"):
            names = _files_of(read_config(folder))
        missing = [name for name in names if sizes is not None and name not in sizes]
        if missing:
            raise UserError(f"{repo}: {CONFIG_FILE} names {missing[0]}, which is missing; report it to the author")
        _fetch(repo, folder.name, names, sizes)
    with _invalid(repo, "incomplete or damaged adapter; report it to the author, or use another revision"):
        adapter.read(folder)
    return folder


def load(pipe: DiffusionPipeline, source: str | Path) -> Adapter:
    """`adapter.load` of a folder, or of owner/name[@revision] on the Hub; available as `customdiff.load`.

    Raises:
        UserError: there is no adapter, it cannot be downloaded, or the pipeline is of another base model.
    """
    return adapter.load(pipe, resolve(source))


def names_repository(source: str | Path) -> bool:
    """Whether `source` has the form owner/name[@revision] and is not an existing folder."""
    if isinstance(source, Path) or source == PIPELINE_ADAPTER or Path(source).exists():
        return False
    return re.fullmatch(REPOSITORY, source, flags=re.ASCII) is not None


def build(
    source: Path | str,
    out: Path,
    repo: str,
    *,
    license: str,
    base_model: str | None = None,
    revision: str | None = None,
    evaluation: Evaluation | None = None,
    with_bin: bool = False,
) -> None:
    """Write everything that `push` uploads to the empty folder `out`.

    The adapter is read and saved again, so that the folder has only data that our loader has read: no pickle file of
    others, and no metadata of other programs.

    Args:
        source: the adapter's folder.
        repo: owner/name, for the model card.
        license: an identifier from the Hub's list.
        base_model: owner/name[@revision] of the base model on the Hub, instead of the one in adapter.json.
        revision: the branch that will be pushed to; None: the default branch.
        evaluation: figures and images to publish. A contact sheet shows the instance images too.
        with_bin: also write `.bin` (pickle) files.

    Raises:
        UserError: the adapter is incomplete, or a path or a secret of this machine would be published.
    """
    learned = adapter.read(source)
    config = model_card.published(learned.config, Path(source), base_model)
    card = model_card.make(repo, config, license=license, revision=revision, evaluation=evaluation)
    adapter.save(Adapter(learned.weights, learned.embeddings, config), out, with_pickle=with_bin)
    card.save(out / README)
    if evaluation:
        metrics = evaluation.metrics.model_dump_json(indent=2)
        (out / "metrics.json").write_text(metrics + "\n", encoding="utf-8")
        (out / "images").mkdir()
        for name, sample in evaluation.samples.items():
            sample.image.save(out / "images" / name)
        if evaluation.sheet:
            save_sheet(evaluation.sheet, out / "contact_sheet.jpg")
    _refuse_private(path for path in out.iterdir() if path.suffix in (".md", ".json"))


def push(
    folder: Path, repo: str, *, private: bool | None = None, revision: str | None = None, message: str | None = None
) -> Pushed:
    """Upload the output of `build` in one commit; the repository and the branch are created if they do not exist.

    The same commit removes files of an earlier push that are not in `folder`, such as a token that is no longer
    learned, `.bin` files and images. Other files in the repository stay. (huggingface_hub splits an upload only if it
    has hundreds of files.)

    Args:
        private: visibility of a new repository, None is private. None leaves an existing one as it is.
        revision: a branch; None: the default branch.
        message: commit message.

    Raises:
        UserError: nothing was uploaded.
    """
    require_token()
    with library_errors(repo):
        _validate(ModelCard.load(folder / README), repo)
        hub = HfApi(library_name="customdiff")
        hub.create_repo(repo, private=private is not False, exist_ok=True)
        before = hub.model_info(repo)
        if private is not None and before.private != private:
            there, wanted = ("private", "public") if before.private else ("public", "private")
            raise UserError(f"{repo}: is {there}; to make it {wanted}, change its settings on the Hub first")
        if revision:
            hub.create_branch(repo, branch=revision, exist_ok=True)
            before = hub.model_info(repo, revision=revision)
        commit = hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message or "Adapter from customdiff",
            delete_patterns=PUBLISHED,
        )
    url = redacted(f"{constants.ENDPOINT}/{repo}")
    return Pushed(url, bool(before.private), commit.oid if commit.oid != before.sha else None)


def require_token() -> None:
    """Check that the user is logged in to the Hub.

    Raises:
        UserError: there is no token, or it cannot be renewed.
    """
    with library_errors("the Hugging Face Hub"):
        token = get_token()
    if token is None:
        raise UserError(f"no token for the Hugging Face Hub: {LOG_IN}; the token needs write access")


def check_repository(name: str, key: str, form: str = "owner/name") -> None:
    """Check the form of a repository's name.

    Args:
        key: argument or key that has the name, for the error message.
        form: owner/name, or owner/name[@revision].

    Raises:
        UserError: begins with `key`.
    """
    pattern = REPOSITORY if "@" in form else REPOSITORY.removesuffix(AT_REVISION)
    if not re.fullmatch(pattern, name, flags=re.ASCII):
        raise UserError(f"{key}: must be {form}, a repository on the Hugging Face Hub (here: {name!r})")


def _validate(card: ModelCard, repo: str) -> None:
    """Let the Hub check a model card, before a repository is created for it."""
    try:
        card.validate()
    except ValueError as error:
        raise UserError(redacted(f"{repo}: the Hub rejected the model card ({error}); check --license")) from None


def _sizes(repo: str, revision: str | None) -> dict[str, float] | None:
    """Size in bytes of each file of a repository; None if the Hub cannot be reached, so that the cache is used."""
    try:
        info = HfApi(library_name="customdiff").model_info(repo, revision=revision, files_metadata=True)
    except HfHubHTTPError:
        raise
    except (HTTPError, OSError):
        return None
    return {file.rfilename: inf if file.size is None else file.size for file in info.siblings or []}


def _fetch(repo: str, revision: str | None, names: list[str], sizes: Mapping[str, float] | None) -> Path:
    """Download files by their exact names, if the repository has them; returns their folder in the cache."""
    sizes = sizes or {}
    for name in names:
        limit = MAX_TEXT_BYTES if name in (CONFIG_FILE, README) else MAX_BYTES
        if sizes.get(name, 0) > limit:
            raise UserError(f"{repo}: {name} has {sizes[name]:.0f} bytes, above the limit of {limit}")
    total = sum(sizes.get(name, 0) for name in names)
    if total > MAX_BYTES:
        raise UserError(f"{repo}: the adapter has {total:.0f} bytes, above the limit of {MAX_BYTES}")
    patterns = [escape(name) for name in names]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="customdiff"))


def _files_of(config: AdapterConfig) -> list[str]:
    """Names of an adapter's safetensors files."""
    stems = [adapter.token_file(token) for token in config.tokens]
    if methods.trains_unet(config):
        stems.append(adapter.weights_name(config))
    return [f"{stem}.safetensors" for stem in stems]


def _from_diffusers(repo: str, folder: Path, sizes: Mapping[str, float] | None, base_model: str | None) -> Path:
    """Convert what diffusers' train_custom_diffusion.py uploads to an adapter in the Hub's assets cache.

    The script uploads `pytorch_custom_diffusion_weights`, a file for each token, and a model card whose metadata name
    the base model. The base model is loaded once, to check that the weights fit it.
    """
    weights = f"{WEIGHTS}.safetensors"
    held = set(sizes) if sizes is not None else {path.name for path in folder.iterdir()}
    if weights not in held:
        if f"{WEIGHTS}.bin" in held:
            raise UserError(
                f"{repo}: has its weights only as a pickle file, which can run code and is not downloaded; if you "
                f"trust its author: `hf download {repo} --local-dir FOLDER`, then `customdiff import FOLDER --format "
                "diffusers --allow-pickle ...`"
            )
        raise UserError(f"{repo}: no adapter, neither {CONFIG_FILE} nor {weights}")
    small = [name for name in held if "/" not in name and (sizes or {}).get(name, 0) <= MAX_TEXT_BYTES]
    token_files = [name for name in sorted(small) if name.endswith(".safetensors") and name != weights]
    _fetch(repo, folder.name, [weights, *token_files], sizes)
    metadata = _metadata(folder / README)
    base_model = base_model or metadata.get("base_model")
    if not base_model:
        raise UserError(f"{repo}: the model card names no base model; name it with --base")
    found = [token for token in (_token_in(folder / name) for name in token_files) if token]
    if not found:
        raise UserError(f"{repo}: no token as safetensors, such as <new1>.safetensors")
    return _imported(repo, folder, base_model, found, metadata.get("instance_prompt") or "{}")


def _imported(repo: str, folder: Path, base_model: str, learned: list[str], prompt: str) -> Path:
    """The adapter that the files in `folder` are converted to; reused if it exists."""
    made_for = re.sub(r"[^\w.-]+", "-", base_model)
    out = cached_assets_path(
        "customdiff", namespace=repo, subfolder=f"{folder.name}-{made_for}", assets_dir=constants.HF_ASSETS_CACHE
    )
    if not (out / CONFIG_FILE).is_file():
        concepts = [formats.ImportedConcept(token, "", prompt.replace(token, "{}")) for token in learned]
        try:
            formats.import_adapter("diffusers", folder, out, base=base_model, concepts=concepts)
        except UserError as error:  # names files by their place in the cache
            raise UserError(f"{repo}: {str(error).replace(f'{folder}{os.sep}', '')}") from error
    return out


def _metadata(path: Path) -> dict[str, str]:
    """`base_model` and `instance_prompt` from the metadata of an untrusted model card; the first one of a list."""
    try:
        data = metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}
    firsts = {key: data.get(key) for key in ("base_model", "instance_prompt")}
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in firsts.items()}
    return {key: value for key, value in firsts.items() if isinstance(value, str)}


def _token_in(path: Path) -> str | None:
    """The token whose embedding a safetensors file contains and that the file is named after."""
    try:
        with safe_open(path, "pt") as file:
            return next((key for key in file.keys() if adapter.token_file(key) == path.stem), None)  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _refuse_private(paths: Iterable[Path]) -> None:
    """Search text files for paths and secrets of this machine.

    Raises:
        UserError: names the file and the kind of secret.
    """
    places = {"your home folder": Path.home(), "the current folder": Path.cwd()}
    secrets = {what: str(place) for what, place in places.items() if len(place.parts) > 1}
    secrets |= {name: os.environ.get(name, "") for name in SECRETS}
    secrets |= {f"your token {number}": token for number, token in enumerate(sorted(tokens()), 1)}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for what, secret in secrets.items():
            if secret.strip() and re.search(rf"(?<![\w.-]){re.escape(secret.strip())}(?![\w-])", text):
                raise UserError(f"{path.name}: would publish {what}; remove it from the adapter's {CONFIG_FILE}")


@contextmanager
def _invalid(repo: str, problem: str) -> Iterator[None]:
    """Report a `UserError` about a file in the cache as a problem of its repository."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{repo}: {problem}") from error
