"""The Hugging Face Hub: publish an adapter, and use one straight from a repository.

Nothing that comes from there is trusted: only adapter.json, README.md and the safetensors files that these name are
fetched, up to a limit; a pickle never is. Nothing that goes there tells of this machine: the files are written anew
from what `adapter.read` found, and are searched for paths and secrets before they leave.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from math import inf
from pathlib import Path
from urllib.parse import urlsplit

from diffusers import DiffusionPipeline
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    cached_assets_path,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever httpx the library is built on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from customdiff.adapters import adapter, formats
from customdiff.adapters.adapter import WEIGHTS, Adapter
from customdiff.adapters.config import CONFIG_FILE, AdapterConfig, read_config
from customdiff.errors import UserError
from customdiff.models import methods
from customdiff.publishing import model_card
from customdiff.publishing.model_card import Evaluation

README = "README.md"
PIPELINES_OWN = "models/adapter"  # where `dvc repro` writes; never taken for a repository, even where it is missing
AT_REVISION = r"(@[\w./-]+)?"
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*" + AT_REVISION
MAX_BYTES, MAX_TEXT_BYTES = 4_000_000_000, 1_000_000
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Pushed:
    """What `push` did: the repository's address, whether it is private, and the commit; None: nothing had changed."""

    url: str
    private: bool
    commit: str | None


def resolve(source: str | Path, *, base_model: str | None = None) -> Path:
    """The folder of an adapter, fetched into the Hub's cache where `source` names a repository.

    Args:
        source: a folder; or, as a str, owner/name[@revision] where no folder of that name is. A Path is a folder.
        base_model: for a repository of diffusers' own script, in place of the base model that its card names.

    Raises:
        UserError: the repository cannot be reached or read, or holds no adapter that can be read without pickle.
    """
    if not names_repository(source):
        return Path(source)
    repo, _, revision = str(source).partition("@")
    with _asking(repo, f"{repo}/{CONFIG_FILE}: there is no such file here; on the Hub: "):
        sizes = _sizes(repo, revision or None)
        folder = _fetch(repo, revision or None, [CONFIG_FILE, README], sizes)
        if (folder / CONFIG_FILE).is_file():
            names = _files_of(_read_untrusted_config(folder, repo))
            missing = [name for name in names if sizes is not None and name not in sizes]
            if missing:
                raise UserError(f"{repo}: lacks {missing[0]}, which its {CONFIG_FILE} speaks of; tell its author")
            _fetch(repo, folder.name, names, sizes)
            _check_whole(folder, repo)
            return folder
        return _from_diffusers(repo, folder, sizes, base_model)


def load(pipe: DiffusionPipeline, source: str | Path) -> Adapter:
    """`adapter.load` of a folder, or of owner/name[@revision] on the Hub; `customdiff.load` is this.

    Raises:
        UserError: there is no adapter, it cannot be fetched, or the pipeline is of another base model.
    """
    return adapter.load(pipe, resolve(source))


def names_repository(source: str | Path) -> bool:
    """Whether it has the form owner/name[@revision], and is no folder here."""
    if isinstance(source, Path) or source == PIPELINES_OWN or Path(source).exists():
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
    with_sheet: bool = False,
    with_bin: bool = False,
) -> None:
    """Write all that `push` uploads into the empty folder `out`.

    The adapter is read and saved anew, so that nothing lies there that our loader has not read: no stranger's pickle
    and no metadata of another program.

    Args:
        source: the adapter's folder.
        repo: owner/name, for the card.
        license: an identifier of the Hub's list.
        base_model: owner/name[@revision] of the base model on the Hub, in place of what the adapter names.
        evaluation: figures and images to show.
        with_sheet: show its contact sheet too, and so the pictures that the adapter learned from.
        with_bin: `.bin` files beside the safetensors.

    Raises:
        UserError: the adapter is not whole, or a path or a secret of this machine would be published.
    """
    learned = adapter.read(source)
    published = model_card.published(learned.config, Path(source), base_model)
    sheet = evaluation.sheet if evaluation and with_sheet else None
    page = model_card.make(
        repo, published, license=license, revision=revision, evaluation=evaluation, with_sheet=sheet is not None
    )
    adapter.save(Adapter(learned.weights, learned.embeddings, published), out, with_pickle=with_bin)
    page.save(out / README)
    if evaluation:
        (out / "metrics.json").write_text(json.dumps(evaluation.metrics, indent=2) + "\n", encoding="utf-8")
        (out / "images").mkdir()
        for name, sample in evaluation.samples.items():
            sample.image.save(out / "images" / name)
    if sheet:
        sheet.save(out / "contact_sheet.jpg", quality=90)
    _refuse_private(path for path in out.iterdir() if path.suffix in (".md", ".json"))


def push(
    folder: Path, repo: str, *, private: bool | None = None, revision: str | None = None, message: str | None = None
) -> tuple[Pushed, list[str]]:
    """Upload what `build` wrote, in one commit, into a repository that is created where there is none.

    What an earlier push left and this one does not write (a word no longer learned, a `.bin`, images) is removed in
    the same commit. `HfApi.upload_folder` does likewise, but may split a folder into several commits.

    Args:
        private: of a new repository, None is private; of one that exists, None leaves it as it is.
        revision: a branch, created where there is none; None: the main one.
        message: of the commit.

    Returns:
        What was done, and the Hub's own remarks on the card.

    Raises:
        UserError: nothing was uploaded.
    """
    require_token()
    with _asking(repo), warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        hub = HfApi(library_name="customdiff")
        hub.create_repo(repo, private=private is not False, exist_ok=True)
        found = hub.model_info(repo)
        if private is not None and found.private != private:
            there, wanted = ("private", "public") if found.private else ("public", "private")
            raise UserError(f"{repo}: is {there} already; make it {wanted} in its settings on the Hub first")
        if revision:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        before = hub.model_info(repo, revision=revision).sha
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        stale = [name for name in hub.list_repo_files(repo, revision=revision) if _is_ours(name) and name not in paths]
        commit = hub.create_commit(
            repo,
            [CommitOperationAdd(name, path) for name, path in paths.items()]
            + [CommitOperationDelete(name, is_folder=False) for name in stale],
            commit_message=message or "Adapter from customdiff",
            revision=revision,
        )
    pushed = Pushed(f"{_endpoint()}/{repo}", bool(found.private), commit.oid if commit.oid != before else None)
    return pushed, [_clean(remark.message) for remark in remarks if remark.category is UserWarning]


def require_token() -> None:
    """Check that the user is logged in on the Hub.

    Raises:
        UserError: there is no token.
    """
    with _asking("the Hub"):
        if get_token() is None:
            raise UserError(f"no token for the Hugging Face Hub: {LOG_IN} to a token with the right to write")


def check_repository(name: str, key: str, form: str = "owner/name") -> None:
    """Check the form of a repository's name.

    Args:
        form: owner/name, or owner/name[@revision].

    Raises:
        UserError: begins with `key`.
    """
    pattern = REPOSITORY if "@" in form else REPOSITORY.removesuffix(AT_REVISION)
    if not re.fullmatch(pattern, name, flags=re.ASCII):
        raise UserError(f"{key}: must be {form}, a repository on the Hugging Face Hub (here: {name!r})")


def _sizes(repo: str, revision: str | None) -> dict[str, float] | None:
    """Size in bytes of each file of a repository; None where the Hub does not answer and the cache must do."""
    try:
        siblings = HfApi(library_name="customdiff").model_info(repo, revision=revision, files_metadata=True).siblings
    except (HfHubHTTPError, HFValidationError):
        raise
    except (HTTPError, OSError):
        return None
    return {file.rfilename: inf if file.size is None else file.size for file in siblings or []}


def _fetch(repo: str, revision: str | None, names: list[str], sizes: Mapping[str, float] | None) -> Path:
    """Fetch files by their exact names, as far as the repository has them; the folder in the cache that they lie in."""
    for name in (CONFIG_FILE, README):
        if sizes and name in names and sizes.get(name, 0) > MAX_TEXT_BYTES:
            raise UserError(f"{repo}: {name} has {sizes[name]:.0f} bytes, more than the limit of {MAX_TEXT_BYTES}")
    total = sum((sizes or {}).get(name, 0) for name in names)
    if total > MAX_BYTES:
        raise UserError(f"{repo}: its files have {total:.0f} bytes, more than an adapter's limit of {MAX_BYTES}")
    patterns = [escape(name) for name in names]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, library_name="customdiff"))


def _read_untrusted_config(folder: Path, repo: str) -> AdapterConfig:
    """adapter.json of a repository."""
    try:
        return read_config(folder)
    except UserError as error:
        raise UserError(f"{repo}: its {CONFIG_FILE} is damaged or of another program; tell its author") from error


def _check_whole(folder: Path, repo: str) -> None:
    """Read the whole adapter once, so that what is wrong with it is said of the repository, not of the cache."""
    try:
        adapter.read(folder)
    except UserError as error:
        raise UserError(f"{repo}: not a whole adapter; tell its author, or name another revision") from error


def _files_of(adapter_config: AdapterConfig) -> list[str]:
    """The safetensors files that an adapter consists of."""
    stems = [adapter.token_file(token) for token in adapter_config.tokens]
    if methods.trains_unet(adapter_config):
        stems.append(adapter.weights_name(adapter_config))
    return [f"{stem}.safetensors" for stem in stems]


def _from_diffusers(repo: str, folder: Path, sizes: Mapping[str, float] | None, base_model: str | None) -> Path:
    """An adapter of ours, beside the Hub's cache, made of what diffusers' train_custom_diffusion.py uploads.

    That is `pytorch_custom_diffusion_weights`, a file for each token, and a card whose metadata name the base model;
    the base model is loaded once, to see that the weights are its own.
    """
    weights = f"{WEIGHTS}.safetensors"
    held = set(sizes) if sizes is not None else {path.name for path in folder.iterdir()}
    if weights not in held:
        if f"{WEIGHTS}.bin" in held:
            raise UserError(
                f"{repo}: has its weights as a pickle alone, which can carry programs and is not fetched; if you trust "
                f"its author: `hf download {repo} --local-dir FOLDER`, then `customdiff import FOLDER --format "
                "diffusers --allow-pickle ...`"
            )
        raise UserError(f"{repo}: holds no adapter, neither {CONFIG_FILE} nor {weights}")
    small = [name for name in held if "/" not in name and (sizes or {}).get(name, 0) <= MAX_TEXT_BYTES]
    tokens = [name for name in sorted(small) if name.endswith(".safetensors") and name != weights]
    _fetch(repo, folder.name, [weights, *tokens], sizes)
    card = _metadata(folder / README)
    base_model = base_model or card.get("base_model")
    if not base_model:
        raise UserError(f"{repo}: its card names no base model; name it by --base")
    found = [word for word in map(_word_in, (folder / name for name in tokens)) if word]
    if not found:
        raise UserError(f"{repo}: holds no token as safetensors, such as <new1>.safetensors beside the weights")
    made_for = re.sub(r"[^\w.-]+", "-", base_model)
    out = cached_assets_path("customdiff", namespace=repo, subfolder=f"{folder.name}-{made_for}")
    if not (out / CONFIG_FILE).is_file():
        prompt = card.get("instance_prompt") or "{}"
        concepts = [formats.ImportedConcept(word, "", prompt.replace(word, "{}")) for word in found]
        try:
            formats.import_adapter("diffusers", folder, out, base=base_model, concepts=concepts)
        except UserError as error:  # speaks of the file's place in the cache
            raise UserError(f"{repo}: {str(error).replace(f'{folder}{os.sep}', '')}") from error
    return out


def _metadata(path: Path) -> dict[str, str]:
    """`base_model` and `instance_prompt` of a stranger's model card, as far as it has them."""
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever YAML it holds, it is a card without metadata then
        return {}
    firsts = {key: data.get(key) for key in ("base_model", "instance_prompt")}
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in firsts.items()}
    return {key: value for key, value in firsts.items() if isinstance(value, str)}


def _word_in(path: Path) -> str | None:
    """The token that a safetensors file is named after and holds an embedding of."""
    try:
        with safe_open(path, "pt") as file:
            return next((key for key in file.keys() if adapter.token_file(key) == path.stem), None)  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def _is_ours(name: str) -> bool:
    """Whether a file of a repository is of the kind that `push` writes, and so is stale where it no longer does."""
    stems = "|".join([WEIGHTS, adapter.LORA_WEIGHTS, adapter.COMPRESSED_WEIGHTS, "<[^/]*>"])
    pattern = rf"({stems})\.(safetensors|bin)|images/[^/]*\.png|contact_sheet\.jpg|metrics\.json"
    return re.fullmatch(pattern, name) is not None


def _refuse_private(paths: Iterable[Path]) -> None:
    """Search texts for what must not leave this machine.

    Raises:
        UserError: names the file, and what kind of thing it holds.
    """
    places = {"your home folder": Path.home(), "the folder you are in": Path.cwd()}
    secrets = {what: str(place) for what, place in places.items() if len(place.parts) > 1}
    secrets |= {name: os.environ.get(name, "") for name in os.environ if name.startswith("MLFLOW_TRACKING_")}
    secrets |= {f"your token{'s' if number else ''}": token for number, token in enumerate(sorted(_tokens()))}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for what, secret in secrets.items():
            if secret.strip() and re.search(rf"{re.escape(secret.strip())}(?![\w-])", text):
                raise UserError(f"{path.name}: would publish {what}; take it out of the adapter's {CONFIG_FILE}")


@contextmanager
def _asking(repo: str, where: str | None = None) -> Iterator[None]:
    """Turn what the Hub's library raises into one line.

    Args:
        where: what the line begins with, in place of the repository's name.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # httpx, huggingface_hub, hf_xet and the file system all have families of their own
        # `from None`: a server's answer may quote what it was sent, and a traceback would print it
        raise UserError(_clean(f"{where or f'{repo}: '}{_reason(error, repo)}")) from None


def _reason(error: BaseException, repo: str) -> str:
    """What went wrong on the way to the Hub or there, and what mends it."""
    chain = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None and deeper not in chain:
        chain.append(deeper)

    def first(kind: type) -> BaseException | None:
        return next((each for each in chain if isinstance(each, kind)), None)

    answer = first(HfHubHTTPError)
    status = answer.response.status_code if answer is not None else None
    if "Invalid metadata in README.md" in str(error):
        return f"the card is refused ({answer.server_message if answer else 'without a word'}); check --license"
    if first(OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it is not whole in the cache; unset it"
    if first(GatedRepoError):
        return f"it is gated; accept its terms at {_endpoint()}/{repo}, then {LOG_IN}"
    if first(RevisionNotFoundError):
        return "there is no such revision; leave @revision out, or name a branch, tag or commit"
    if first(RepositoryNotFoundError):
        return f"there is no {repo}, or it is private: check the name, or {LOG_IN} to a token that may see it"
    if status == 401:
        return f"the token is not valid (any more); {LOG_IN} to a fresh one"
    if status == 403:
        return "your token has no right to write there; check the owner's name, or take a token with the right to write"
    if status is not None:
        said = f"the answer is {status} ({answer.server_message or 'without a word'})"
        return f"{said}; try again later" if status == 429 or status >= 500 else said
    if first(HFValidationError):
        return f"{repo} cannot be a repository's name; owner/name would be"
    if first(HTTPError) or first(ConnectionError) or first(TimeoutError):
        root = chain[-1]
        return f"{_endpoint()} cannot be reached ({root or type(root).__name__}); check the network and HF_ENDPOINT"
    return f"{type(error).__name__}: {error}"


def _endpoint() -> str:
    """The Hub's address, without a user's name and password."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _clean(text: object) -> str:
    """One line, in which no token is."""
    line = " ".join(str(text).split())
    for token in _tokens():
        line = line.replace(token, "***")
    return re.sub(r"\bhf_\w{8,}|(?<=Bearer )\S+", "***", line)[:500]


def _tokens() -> set[str]:
    """Every token that could be sent."""
    try:
        found = get_token()
    except Exception:  # a login that expired and cannot be renewed
        found = None
    known = {found, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    return {token.strip() for token in known if token and token.strip()}
