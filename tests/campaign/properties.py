"""Property-based search: no input of any shape ends in anything but a result or one line."""

import contextlib
import io
import json
import random
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import httpx
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from customdiff import config
from customdiff.adapters.config import read_config
from customdiff.errors import UserError, printable
from customdiff.redaction import redact
from customdiff.sources import archive, image_folder

from . import service_cases
from .params_cases import GOOD, fields

KEYS = [key for key, _ in fields(config.Params)]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.just(10**30),
    st.dates(),
    st.binary(max_size=5),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
ENTRY = st.dictionaries(
    st.sampled_from(["url", "caption", "image", "similarity", "id", "image_path"]), JSON, max_size=5
)
MEMBER = st.tuples(st.text(min_size=1, max_size=30), st.binary(max_size=50))
SECRET = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/?#'\"<>\\"), min_size=6, max_size=20
)


def params_values(folder: Path, draw: tuple[str, object]) -> None:
    """A valid params.yaml with any value at any key."""
    key, value = draw
    values: dict = json.loads(json.dumps(GOOD))
    part = values
    *parents, last = key.split(".")
    for parent in parents:
        part = part.setdefault(parent, {})
    part[last] = value
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    config.load(path)


def params_bytes(folder: Path, data: bytes) -> None:
    """Any bytes as params.yaml."""
    (folder / "params.yaml").write_bytes(data)
    config.load(folder / "params.yaml")


def params_text(folder: Path, text: str) -> None:
    """Any text of YAML's own characters as params.yaml."""
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    config.load(folder / "params.yaml")


def adapter_json(folder: Path, draw: tuple[str, object]) -> None:
    """An adapter.json with any value at any key."""
    key, value = draw
    good = {"base": {"model": "x"}, "concepts": {"cat": {"modifier_token": "<new1>"}}}
    (folder / "adapter.json").write_text(json.dumps(good | {key: value}))
    read_config(folder).base_model()


def archives(folder: Path, draw: tuple[list[tuple[str, bytes]], int, int]) -> None:
    """A zip of any members, of which one byte is changed; nothing is written outside its folder."""
    members, place, byte = draw
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w") as made:
        for name, data in members:
            with contextlib.suppress(ValueError, UnicodeError):
                made.writestr(name, data)
    data = bytearray(buffer.getvalue())
    data[place % len(data)] = byte
    (folder / "a.zip").write_bytes(data)
    try:
        archive.unpack(folder / "a.zip", folder / "into", 1, key="key")
        assert all(name == image_folder.natural(name)[1] for name in image_folder.walk(folder / "into"))
    finally:
        assert {path.name for path in folder.iterdir()} <= {"a.zip", "into"}


def knn_answers(folder: Path, entries: list[dict]) -> None:
    """Any entries of a knn-service."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=json.dumps(entries) if request.method == "POST" else b"no image")

    with contextlib.chdir(folder):
        service_cases.retrieve("http://127.0.0.1:9/knn-service", 2, httpx.MockTransport(answer))


def addresses(folder: Path, draw: tuple[str, str]) -> None:
    """No secret is left in an address."""
    user, secret = draw
    secret = f"S3cr3t{secret}"
    for text in (f"https://{user}:{secret}@h.org/x", f"https://h.org/x?token={secret}", f"databricks://{secret}"):
        assert "S3cr3t" not in redact(text), text


ADAPTER_KEYS = ["base", "concepts", "method", "lora_rank", "compressed", "fingerprint", "versions"]
PROPERTIES: dict[str, tuple[Callable, st.SearchStrategy, int]] = {  # and the share of the examples
    "params.yaml: any value": (params_values, st.tuples(st.sampled_from(KEYS), VALUES), 4),
    "params.yaml: any bytes": (params_bytes, st.binary(max_size=100), 1),
    "params.yaml: any text": (params_text, st.text("ab:-[]{}&*!<>|'\"#%@`,?~ \n0123.e", max_size=60), 4),
    "adapter.json: any value": (
        adapter_json,
        st.tuples(st.sampled_from(ADAPTER_KEYS), JSON),
        2,
    ),
    "archives: any members": (
        archives,
        st.tuples(st.lists(MEMBER, max_size=4), st.integers(0, 10**6), st.integers(0, 255)),
        2,
    ),
    "knn answers: any entries": (knn_answers, st.lists(ENTRY, max_size=3), 1),
    "addresses: any secret": (addresses, st.tuples(SECRET, SECRET), 2),
}  # fmt: skip


def check(name: str, seed: int, examples: int) -> tuple[int, str]:
    """Search for a counterexample of a property; returns the number of inputs tried, and the counterexample."""
    action, strategy, _ = PROPERTIES[name]
    tried = 0
    random.seed(seed)

    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def search(draw: object) -> None:
        nonlocal tried
        tried += 1
        folder = Path(tempfile.mkdtemp())
        try:
            action(folder, draw)
        except UserError as error:
            lines = printable(str(error)).splitlines()
            assert all(line.startswith(str(folder)) for line in lines[1:]), lines
        finally:
            shutil.rmtree(folder)

    try:
        search()
    except BaseException as error:
        return tried, f"{type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"[:600]
    return tried, ""
