"""Wrong params.yaml files: for each key of the schema values of wrong types, and special ones by hand."""

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from customdiff.cli import commands
from customdiff.config import Params
from customdiff.config.section import Section

from .case import Case

LONG = "1" * 5000
WRONG: dict[type, list[str]] = {
    int: ["true", "'five'", "[1]", "{a: 1}", ".nan", "1.5", "010", "1:30", "0x10", LONG, "99999999999999999999", "-7"],
    float: ["true", "'five'", "[1]", "{a: 1}", ".nan", ".inf", "1e400", "1:30", LONG, "-7"],
    str: ["true", "5", "[a]", "{a: 1}", r'"a\ab"', r'"\ud800"', r'"a\nb"', r'"\0"'],
    bool: ["1", "0", "yes", "'true'", "[]", "on"],
    list: ["5", "{a: 1}", "[[a]]", "[5]", r'["\ud800"]'],
    Section: ["5", "[a]", "text", "{nonsense: 1}"],
    Literal: ["nonsense", "5", "true", "[a]"],
}
GOOD = {
    "concepts": {
        "cat": {
            "source": {"path": "photos"},
            "modifier_token": "<new1>",
            "class_prompt": "cat",
            "instance_prompt": "photo of a {} cat",
        }
    }
}
NAMES = [
    "cat; touch PWNED",
    "$(touch PWNED)",
    "`touch PWNED`",
    "cat && touch PWNED #",
    "cat | touch PWNED",
    "cat\ntouch PWNED",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "../../docs",
    "${touch PWNED}",
]
TOKENS = [
    "a/b",
    "a\\b",
    "pytorch_custom_diffusion_weights",
    "compressed_weights",
    "x" * 300,
    "..",
    "a b",
    "",
    "\x1b[31m",
]
URLS = ["https://[::1", "https://", "http://h/x.zip", "https://h:99999/x", "ftp://h/x", "https://h:p/x", "file:///etc"]
SUBFOLDERS = ["../teapot", "/etc", "a/../../b", ".."]
TEXTS = {  # whole files
    "2024-13-45 as a date": ("base: {seed: 2024-13-45}", "base.seed"),
    "an integer of 5000 digits as a key": (f"{LONG}: 1", "not valid YAML"),
    "a false tag": ("base: {seed: !!int abc}", "not valid YAML"),
    "a false timestamp": ("base: {seed: !!timestamp abc}", "not valid YAML"),
    "a false binary": ("base: {model: !!binary abc}", "not valid YAML|base.model"),
    "a Python object": ("base: !!python/object/apply:os.system ['touch PWNED']", "not valid YAML"),
    "a list as a key": ("? [a, b]\n: 1", "not valid YAML"),
    "a mapping as a key": ("? {a: b}\n: 1", "not valid YAML"),
    "10000 lists": ("base: " + "[" * 10_000, "nested deeper"),
    "10000 mappings": ("base: " + "{a: " * 10_000, "nested deeper"),
    "aliases of aliases": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "unknown key",
    ),
    "merge keys of merge keys": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
        ),
        "not valid YAML|unknown key",
    ),
    "an alias of itself": ("base: &a [*a]", "base|not valid YAML"),
    "a key twice": ("base: {seed: 1, seed: 2}", "given twice"),
    "a tab": ("base:\n\tseed: 1", "not valid YAML"),
    "control characters": ("base: \x01", "not valid YAML"),
    "megabytes": ("#" * 2_000_000, "longer than"),
    "two documents": ("base: {}\n---\nbase: {}", "not valid YAML"),
    "nothing": ("", "must contain"),
    "a list": ("- a", "must contain"),
    "a number": ("5", "must contain"),
    "no concepts": ("base: {}", "concepts: is required"),
    "concepts null": ("concepts:", "concepts"),
    "concepts a list": ("concepts: [cat]", "concepts"),
    "an empty concept": ("concepts: {cat: }", "concepts.cat"),
}


def cases() -> Iterator[Case]:
    """All cases of params.yaml."""
    for key, value in wrong_values():
        yield Case("params.yaml", f"{key}: {value[:40]}", checks(text_with(key, value)), pattern(key))
    for name in NAMES:
        yield Case("params.yaml", f"concept {name!r}", checks(renamed(name)), "params.yaml: concepts")
    for key, values in (
        ("modifier_token", TOKENS),
        ("source.url", URLS),
        ("source.subfolder", SUBFOLDERS),
        ("instance_prompt", ["no braces", "{} {}", ""]),
        ("class_prompt", [""]),
        ("source.sha256", ["abc"]),
        ("source.hub", ["a", "a/b/c", "../x"]),
    ):
        for value in values:
            full = f"concepts.cat.{key}"
            text = text_with(full, yaml.safe_dump(value, width=1_000_000).removesuffix("\n...\n").strip())
            yield Case("params.yaml", f"{full}: {value!r:.60}", checks(text), pattern(full))
    for key, value in (
        ("download", "{minimum: 9, maximum: 5}"),
        ("retrieve", "{minimum: 9, num_class_images: 5}"),
        ("download.timeout", "1e300"),
        ("retrieve.service.timeout", "1e300"),
        ("evaluate.steps", "1001"),
        ("train.validation.steps", "5000"),
        ("retrieve.generate.steps", "5000"),
        ("prepare.resolution", "1000000"),
        ("base.device", "cuda; touch PWNED"),
    ):
        yield Case("params.yaml", f"{key}: {value}", checks(text_with(key, value)), pattern(key))
    for name, (text, expected) in TEXTS.items():
        yield Case("params.yaml", name, checks(text), expected)
    for name, data in (
        ("UTF-16", "base: {}".encode("utf-16")),
        ("latin-1", b"base: {model: \xe9}"),
        ("bytes", bytes(range(256))),
    ):
        yield Case("params.yaml", name, checks(data), "cannot be read|not valid YAML")


def wrong_values() -> Iterator[tuple[str, str]]:
    """Each key of the schema with each value that is wrong for its type."""
    for key, kind in fields(Params):
        for value in WRONG[kind]:
            yield key, value


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and types of a section, with those of its sections."""
    for name, field in section.model_fields.items():
        kind, key = _kind(field.annotation), f"{prefix}{name}"
        if key == "concepts":
            yield from fields(get_args(field.annotation)[1], "concepts.cat.")
        elif isinstance(kind, type) and issubclass(kind, Section):
            yield key, Section
            yield from fields(kind, f"{key}.")
        else:
            yield key, kind


def _kind(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(each for each in get_args(annotation) if each is not type(None))
    if get_origin(annotation) is Literal:
        return Literal
    return (
        _kind(get_args(annotation)[0]) if hasattr(annotation, "__metadata__") else get_origin(annotation) or annotation
    )


def text_with(key: str, value: str) -> str:
    """A valid params.yaml but for `key`, which has the YAML text `value`."""
    values: dict = yaml.safe_load(yaml.safe_dump(GOOD))
    part = values
    *parents, last = key.split(".")
    for parent in parents:
        part = part.setdefault(parent, {})
    if key.startswith("concepts.cat.source."):
        part.pop("path", None)
    part[last] = "@@@"
    return yaml.safe_dump(values).replace("'@@@'", "@@@").replace("@@@", value)


def renamed(name: str) -> str:
    """A valid params.yaml but for the name of its concept."""
    return yaml.safe_dump({"concepts": {name: GOOD["concepts"]["cat"]}})


def pattern(key: str) -> str:
    """Pattern of a line that names the key, or the section whose keys exclude each other."""
    *parents, last = key.split(".")
    section = re.escape(".".join(parents))
    return rf"params\.yaml: ({section}(\.{last})?|{last})\b"


def checks(text: str | bytes) -> Callable[[], None]:
    """Run `customdiff check` on a file."""

    def act() -> None:
        Path("params.yaml").write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        commands(["check"])

    return act
