"""Damaged and hostile adapters, and wrong options of the command line."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from customdiff import config
from customdiff.adapters import adapter
from customdiff.cli import commands
from customdiff.config import Base
from customdiff.models import base

from . import params_cases, source_cases
from .case import EITHER, Case

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"
WRONG = (
    "null",
    "5",
    '"x"',
    "[]",
    "{}",
    "true",
    "NaN",
    "1e999",
    "-1",
    '"\\ud800"',
    "[[[]]]",
    "9" * 5000,
    '"' + "x" * 100_000 + '"',
)
Change = Callable[[Path], object]


def cases(tiny_base: Path, learned: Path) -> Iterator[Case]:
    """All cases of adapters.

    Args:
        tiny_base: folder of a small base model.
        learned: folder of an adapter for it.
    """
    values = json.loads((learned / "adapter.json").read_text())
    for path in key_paths(values):
        for wrong in ("removed", *WRONG):
            yield Case(
                "adapter.json",
                f"{'.'.join(map(str, path))}: {wrong[:20]}",
                loads(tiny_base, learned, replaces(path, wrong)),
                EITHER,
            )
    for name, text in TEXTS.items():
        yield Case("adapter.json", name, loads(tiny_base, learned, writes("adapter.json", text)), "adapter.json: ")
    for name, change, expected in FILES:
        yield Case("adapters", name, loads(tiny_base, learned, change), expected)
    for arguments, expected, status in NEW:
        yield Case("customdiff new", " ".join(arguments)[:80], adds(arguments), expected, status)
    for arguments, expected, status in OPTIONS:
        yield Case("options", " ".join(arguments)[:80], commanded(tiny_base, learned, arguments), expected, status)


def key_paths(values: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """Paths of all keys, and of the first entry of each list."""
    entries = (
        values.items() if isinstance(values, dict) else list(enumerate(values))[:1] if isinstance(values, list) else []
    )
    for key, value in entries:
        yield (*prefix, key)
        yield from key_paths(value, (*prefix, key))


def loads(tiny_base: Path, learned: Path, change: Change) -> Callable[[], None]:
    """Load a copy of an adapter that was changed; an adapter that loads must be usable."""

    def act() -> None:
        folder = shutil.copytree(learned, "adapter")
        change(Path(folder))
        pipe = base.load_pipeline(Base(model=str(tiny_base)))
        loaded = adapter.load(pipe, folder)
        loaded.config.base_model(str(tiny_base))
        image = pipe("a cat", num_inference_steps=1, output_type="np").images
        assert torch.tensor(image).isfinite().all()
        assert not os.path.exists("PWNED")

    return act


def replaces(path: tuple, wrong: str) -> Change:
    """Replace or remove a value of adapter.json."""

    def change(folder: Path) -> None:
        values = json.loads((folder / "adapter.json").read_text())
        part = values
        for key in path[:-1]:
            part = part[key]
        if wrong == "removed":
            del part[path[-1]]
        else:
            part[path[-1]] = "@@@"
        (folder / "adapter.json").write_text(json.dumps(values).replace('"@@@"', wrong))

    return change


def writes(name: str, data: bytes | str) -> Change:
    """Write a file of the adapter."""
    return lambda folder: (folder / name).write_bytes(
        data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    )


def tensors(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Edit the largest tensor of a file."""

    def change(folder: Path) -> None:
        found = load_file(folder / name)
        key = max(found, key=lambda each: found[each].numel())
        found[key] = edit(found[key]).contiguous()
        save_file(found, folder / name)

    return change


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one entry."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return edit


def header(text: bytes, size: int | None = None) -> bytes:
    """A safetensors file of a header."""
    return struct.pack("<Q", len(text) if size is None else size) + text


def linked(name: str, target: str) -> Change:
    """Replace a file by a link."""
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))


def piped(name: str) -> Change:
    """Replace a file by a FIFO."""
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def removed(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


TEXTS: dict[str, bytes | str] = {
    "nothing": "",
    "null": "null",
    "a list": "[]",
    "an empty object": "{}",
    "half of JSON": '{"base": {',
    "bytes": bytes(range(256)),
    "UTF-16": "{}".encode("utf-16"),
    "a lone surrogate": '"\ud800"',
    "deep JSON": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "megabytes": " " * 10_000_000,
    "a BOM": b"\xef\xbb\xbf{}",
}
FILES: list[tuple[str, Change, str]] = [
    ("no adapter.json", removed("adapter.json"), "adapter.json: no adapter found"),
    ("a FIFO as adapter.json", piped("adapter.json"), "adapter.json"),
    ("a device as adapter.json", linked("adapter.json", "/dev/zero"), "adapter.json"),
    ("a link to itself as adapter.json", linked("adapter.json", "adapter.json"), "adapter.json"),
    ("the same token twice", replaces(("concepts", "dog"), '{"modifier_token": "<new1>"}'), "modifier_token"),
    ("a token that leads outside", replaces(("concepts", "cat", "modifier_token"), '"../../x"'), "modifier_token"),
    ("a token that is a file of the adapter", replaces(("concepts", "cat", "modifier_token"), '"pytorch_custom_diffusion_weights"'), "modifier_token"),
    ("a token of 300 characters", replaces(("concepts", "cat", "modifier_token"), '"' + "x" * 300 + '"'), "modifier_token"),
    *((f"{kind} weights", tensors(WEIGHTS, filled(value)), "not finite") for kind, value in (("NaN", float("nan")), ("infinite", float("inf")))),
    *((f"{kind} embedding", tensors("<new1>.safetensors", filled(value)), "not finite") for kind, value in (("NaN", float("nan")), ("infinite", float("-inf")))),
    ("a NaN fingerprint", replaces(("fingerprint", 0), "NaN"), "fingerprint"),
    ("an infinite fingerprint", replaces(("fingerprint", 0), "1e999"), "fingerprint"),
    ("another fingerprint", replaces(("fingerprint", 0), "99"), "another base model"),
    ("no fingerprint", replaces(("fingerprint",), "[]"), "another base model"),
    ("no processors", replaces(("processors",), "[]"), "another base model"),
    *(
        (f"{what} weights", change, "adapter")
        for what, change in (
            ("integer", tensors(WEIGHTS, lambda x: x.int())),
            ("boolean", tensors(WEIGHTS, lambda x: x > 0)),
            ("complex", tensors(WEIGHTS, lambda x: torch.zeros(x.shape, dtype=torch.int64))),
            ("transposed", tensors(WEIGHTS, lambda x: x[:, :-1])),
            ("flat", tensors(WEIGHTS, lambda x: x.flatten())),
            ("empty", tensors(WEIGHTS, lambda x: x[:0])),
            ("missing", removed(WEIGHTS)),
            ("no bytes of", writes(WEIGHTS, b"")),
            ("a pickle as", writes(WEIGHTS, b"cos\nsystem\n(S'touch PWNED'\ntR.")),
            ("a zip as", writes(WEIGHTS, b"PK\x03\x04" + bytes(100))),
            ("a huge header of", writes(WEIGHTS, header(b"{}", 2**63))),
            ("a header above the file of", writes(WEIGHTS, header(b"{}", 10_000))),
            ("a header that is no JSON of", writes(WEIGHTS, header(b"\xff" * 64))),
            ("a deep header of", writes(WEIGHTS, header(b"[" * 100_000))),
            ("offsets outside of", writes(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'))),
            ("overlapping offsets of", writes(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + bytes(4))),
            ("a shape of 10**18 of", writes(WEIGHTS, header(b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}') + bytes(4))),
            ("half of the", lambda folder: os.truncate(folder / WEIGHTS, 5000)),
            ("a link to itself as", linked(WEIGHTS, WEIGHTS)),
            ("a folder as", lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir())),
            ("other tensors as", lambda folder: save_file({"x": torch.zeros(3)}, folder / WEIGHTS)),
            ("a deserializable .bin beside no", lambda folder: ((folder / WEIGHTS).unlink(), (folder / "pytorch_custom_diffusion_weights.bin").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR."))),
        )
    ),
    *(
        (f"{what} embedding", change, "adapter|embedding|<new1>")
        for what, change in (
            ("a wide", tensors("<new1>.safetensors", lambda x: torch.zeros(99))),
            ("a scalar as", tensors("<new1>.safetensors", lambda x: torch.tensor(1.0))),
            ("a matrix as", tensors("<new1>.safetensors", lambda x: x[:, None].repeat(1, 3))),
            ("an integer", tensors("<new1>.safetensors", lambda x: x.long())),
            ("a missing", removed("<new1>.safetensors")),
            ("an empty", writes("<new1>.safetensors", b"")),
            ("another token's", lambda folder: save_file({"<other>": torch.zeros(32)}, folder / "<new1>.safetensors")),
        )
    ),
    *((f"method {method}", replaces(("method",), f'"{method}"'), "adapter") for method in ("lora", "nonsense")),
    ("a compression that is none", replaces(("compressed",), '{"ranks": [1]}'), "adapter"),
    ("a compression of nonsense", replaces(("compressed",), '{"ranks": "x"}'), "adapter.json"),
    ("all of cross-attention", replaces(("freeze_model",), '"crossattn"'), "incomplete adapter"),
]  # fmt: skip


def commanded(tiny_base: Path, learned: Path, arguments: tuple[str, ...]) -> Callable[[], None]:
    """Run `customdiff`, with an adapter in models/adapter and its base model in base."""

    def act() -> None:
        os.symlink(tiny_base, "base")
        shutil.copytree(learned, "models/adapter")
        Path("file").write_text("mine")
        os.mkfifo("fifo")
        try:
            commands(list(arguments))
        finally:
            assert Path("file").read_text() == "mine"
            assert not os.path.exists("PWNED")

    return act


QUICK = ("--base", "base", "--steps", "1")
OPTIONS: list[tuple[tuple[str, ...], str, int]] = [
    (("sample", "a cat", *QUICK), "", 0),
    (("sample", "a cat", *QUICK, "--height", "24"), "", 0),
    (("sample", "a {} {0} {x} cat", *QUICK), "", 0),
    (("sample", "../../x; touch PWNED", *QUICK), "", 0),
    (("sample", "", *QUICK), "", 0),
    (("sample", "cat " * 5000, *QUICK), "", 0),
    (("sample", "a cat", *QUICK, "--height", "1000000"), "--height", 2),
    (("sample", "a cat", *QUICK, "--height", "20"), "--height", 1),
    (("sample", "a cat", *QUICK, "--width", "-8"), "--width", 2),
    (("sample", "a cat", "--base", "base", "--steps", "2000"), "--steps", 2),
    (("sample", "a cat", "--base", "base", "--steps", "0"), "--steps", 2),
    (("sample", "a cat", *QUICK, "--guidance-scale", "inf"), "--guidance-scale", 1),
    (("sample", "a cat", *QUICK, "--guidance-scale", "nan"), "--guidance-scale", 2),
    (("sample", "a cat", *QUICK, "--guidance-scale", "-1"), "--guidance-scale", 2),
    (("sample", "a cat", *QUICK, "--eta", "nan"), "--eta", 2),
    (("sample", "a cat", *QUICK, "--seed", "-1"), "--seed", 2),
    (("sample", "a cat", *QUICK, "--seed", str(2**32)), "--seed", 2),
    (("sample", "a cat", *QUICK, "--device", "tpu"), "--device", 1),
    (("sample", "a cat", *QUICK, "--scheduler", "magic"), "--scheduler", 2),
    (("sample", "a cat", *QUICK, "--out", "file"), "--out: file is a file", 1),
    (("sample", "a cat", *QUICK, "--out", "file/x"), "file", 1),
    (("sample", "a cat", *QUICK, "--out", "x" * 300), "name too long", 1),
    (("sample", "a\udcffcat", *QUICK), "PROMPT", 1),
    (("sample", "a cat", "--base", "nowhere"), "base.model|nowhere", 1),
    (("sample", "a cat", "--base", "file"), "base.model", 1),
    (("sample", "a cat", "--base", "fifo"), "base.model", 1),
    (("sample", "a cat", *QUICK, "--adapter", "nowhere"), "nowhere", 1),
    (("sample", "a cat", *QUICK, "--adapter", "file"), "file", 1),
    (("sample", "a cat", *QUICK, "--adapter", ""), "adapter", 1),
    (("sample", "a cat", *QUICK, "--checkpoint", "latest"), "checkpoints", 1),
    (("sample", "a cat", *QUICK, "--checkpoint", "../.."), "checkpoint", 1),
    (("sample", "a cat", *QUICK, "--checkpoint", "9" * 5000), "checkpoint", 1),
    (("sample", "a cat", *QUICK, "--checkpoint", "-1"), "checkpoint", 1),
    (("sample",), "Missing argument|Usage", 2),
    (("check", "nowhere"), "nowhere: cannot be read", 1),
    (("check", "fifo"), "fifo: cannot be read", 1),
    (("check", "/dev/zero"), "/dev/zero: cannot be read", 1),
    (("check", "base"), "base: cannot be read", 1),
    (("check", "models/adapter/<new1>.safetensors"), "cannot be read|not valid YAML", 1),
    (("preset", "nonsense"), "NAME", 1),
    (("preset", "../../params"), "NAME", 1),
    (("nonsense",), "No such command", 2),
    (("sweep",), "params.yaml|checkpoints", 1),
    (("sweep", "--steps", "a;b"), "params.yaml|--steps|checkpoints", 1),
    (("compare",), "params.yaml|Usage|Missing", 1),
    (("export", "models/adapter", "--format", "nonsense"), "nonsense|Usage", 2),
    (("merge", "models/adapter", "nowhere", "--out", "merged"), "nowhere", 1),
    (("merge", "models/adapter", "models/adapter", "--out", "merged"), "at least two different", 1),
    (("merge", "models/adapter", "--out", "file"), "--out|two|at least", 1),
    (("compress", "models/adapter", "--out", "file"), "file|--out|Usage", 1),
    (("compress", "nowhere", "--out", "new"), "nowhere|Usage", 1),
    (("import", "file", "--out", "new"), "file|Usage|Missing", 2),
    (("push", "a/b/c"), "OWNER/NAME|a/b/c", 1),
    (("push", "owner/name", "--adapter", "nowhere", "--dry-run", "new", "--license", "mit"), "nowhere", 1),
    (("push", "owner/name", "--dry-run", "file", "--license", "mit"), "--dry-run", 1),
]  # fmt: skip


def adds(arguments: tuple[str, ...]) -> Callable[[], None]:
    """Run `customdiff new` beside a concept with photos; params.yaml stays valid whatever happens."""

    def act() -> None:
        text = yaml.safe_dump(params_cases.GOOD)
        Path("params.yaml").write_text(text)
        source_cases.good("photos", *(f"{number}.png" for number in range(5)))
        source_cases.writes(source_cases.zipped(("../x.png", source_cases.png(9, 9))))()
        os.mkfifo("fifo")
        os.mkfifo("photos/fifo.png")
        try:
            commands(["new", *arguments, "--no-sheet"])
        finally:
            config.load("params.yaml")
            assert {path.name for path in Path().iterdir()} <= {
                "params.yaml",
                "params.yaml.bak",
                "photos",
                "photos.zip",
                "fifo",
                "data",
            }

    return act


DOG = ("--class", "dog")
NEW: list[tuple[tuple[str, ...], str, int]] = [
    (("rex", "photos", *DOG), "", 0),
    (("rex", "photos", *DOG, "--only"), "", 0),
    (("rex", "photos", *DOG, "--no-copy"), "", 0),
    (("rex", "photos", "--class", "a: b # {c}"), EITHER, 1),
    (("rex", "photos", "--class", "dog\n  evil: true"), EITHER, 1),
    (("rex", "photos", "--class", "<script>"), EITHER, 1),
    (("rex", "photos", "--class", ""), EITHER, 1),
    (("rex", "photos", "--class", "x" * 300), EITHER, 1),
    (("rex", "photos", "--class", "do\udcffg"), EITHER, 1),
    *(((name, "photos", *DOG), "error: ", 1) for name in params_cases.NAMES),
    *((("rex", "photos", *DOG, "--token", token), EITHER, 1) for token in params_cases.TOKENS if not token.startswith("-")),
    (("rex", "photos", *DOG, "--token", "<new1>"), "token", 1),
    (("cat", "photos", *DOG), "cat", 1),
    (("rex", "nowhere", *DOG), "nowhere", 1),
    (("rex", "fifo", *DOG), "fifo", 1),
    (("rex", "/dev/zero", *DOG), "/dev/zero", 1),
    (("rex", "params.yaml", *DOG), "params.yaml", 1),
    (("rex", "photos.zip", *DOG), "unsafe archive", 1),
    (("rex", "photos/0.png", *DOG), "1 good image|minimum|at least", 1),
    (("rex", "photos", *DOG, "--params", "nowhere"), "nowhere", 1),
    (("rex", "photos", *DOG, "--params", "fifo"), "fifo", 1),
    (("rex", ".", *DOG), EITHER, 1),
    (("rex", "/proc/self", *DOG), "error: ", 1),
]  # fmt: skip
