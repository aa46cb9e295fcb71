"""params.yaml as a page or a command read it: edits of its text, the difference, and a write that overwrites no one."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from customdiff import config
from customdiff.config import Concept, Params, strict_yaml, unknown_tokens
from customdiff.errors import UserError
from customdiff.files import atomic_file
from customdiff.new_concept import entry


class ChangedOutsideError(UserError):
    """The file was edited by someone else since it was read; `difference` is a unified diff of that edit."""

    def __init__(self, path: Path, difference: str) -> None:
        super().__init__(f"{path}: was edited outside; nothing was written; load it again, and repeat the edit")
        self.difference = difference


@dataclass(frozen=True)
class ParamsFile:
    """A params file and the bytes that were read from it."""

    path: Path
    data: bytes

    @classmethod
    def read(cls, path: Path | str = "params.yaml") -> "ParamsFile":
        """Read a valid params file.

        Raises:
            UserError: it cannot be read or is not valid.
        """
        path = Path(path)
        config.load(path)  # errors name the file and the key
        return cls(path, path.read_bytes())

    @property
    def text(self) -> str:
        """The text, with its line ends as they are."""
        return self.data.decode()

    @property
    def params(self) -> Params:
        """The validated contents."""
        return config.parse(self.text, self.path)

    def is_current(self) -> bool:
        """Whether the file on disk still has these bytes."""
        return self.path.is_file() and self.path.read_bytes() == self.data

    def check_is_current(self) -> None:
        """Check that no one else has edited the file since it was read.

        Raises:
            ChangedOutsideError: someone has.
        """
        now = self.path.read_bytes() if self.path.is_file() else b""
        if now != self.data:
            raise ChangedOutsideError(self.path, self.difference(now.decode(errors="replace")))

    def difference(self, edited: str) -> str:
        """Unified diff from this text to an edited one, with one line of context; empty if they are equal."""
        lines = (self.text.splitlines(), edited.splitlines())
        return "\n".join(difflib.unified_diff(*lines, str(self.path), f"{self.path} (new)", n=1, lineterm=""))

    def write(self, edited: str) -> "ParamsFile":
        """Replace the file atomically; returns it as it is now.

        Raises:
            ChangedOutsideError: the file is no longer as it was read; nothing was written.
            UserError: the edited text is not valid.
        """
        config.parse(edited, self.path)
        with atomic_file(self.path) as incoming:
            self.check_is_current()
            incoming.write_bytes(edited.encode())
        return ParamsFile(self.path, edited.encode())


def with_values(text: str, values: Mapping[str, float | str | bool | None]) -> str:
    """The text of params.yaml with other values of some keys; every other character stays.

    Args:
        text: a valid params.yaml.
        values: by dotted key, such as `train.max_steps`; a key that the file lacks is added to its section.

    Raises:
        UserError: a section is written so that it cannot be edited without changing other parts.
    """
    expected = strict_yaml.parse(text)
    try:
        for key, value in values.items():
            section, _, name = key.partition(".")
            if (expected.get(section) or {}).get(name, ...) == value:
                continue
            text = _with_value(text, section, name, yaml.safe_dump(value).removesuffix("...\n").strip())
            expected[section] = {**(expected.get(section) or {}), name: value}
        as_meant = strict_yaml.parse(text) == expected
    except (ValueError, yaml.YAMLError):  # an alias lost its anchor
        as_meant = False
    if not as_meant:
        raise UserError(f"params.yaml: cannot be edited as it is written; set {', '.join(values)} by hand")
    return text


def _with_value(text: str, section: str, name: str, value: str) -> str:
    """The text with one scalar replaced, or added as the first key of its section."""
    mapping = entry.find(yaml.compose(text, yaml.SafeLoader), section)
    node = entry.find(mapping, name)
    if node is not None:
        return text[: node.start_mark.index] + value + text[node.end_mark.index :]
    newline = "\r\n" if "\r\n" in text else "\n"
    if mapping is None:
        return f"{text.rstrip()}{newline}{newline}{section}:{newline}  {name}: {value}{newline}"
    start = mapping.start_mark.index
    if isinstance(mapping, yaml.MappingNode) and mapping.flow_style:
        return f"{text[: start + 1]}{name}: {value}{', ' if mapping.value else ''}{text[start + 1 :]}"
    return f"{text[:start]}{name}: {value}{newline}{' ' * mapping.start_mark.column}{text[start:]}"


def with_concepts_of(text: str, preset: str) -> str:
    """The text of a preset, with the concepts of another params.yaml instead of its own.

    Validation prompts of the preset that name a token of its other concepts are removed.

    Args:
        text: a valid params.yaml, whose concepts are kept.
        preset: the text of the preset.

    Raises:
        UserError: the preset cannot be edited.
    """
    entries: dict[str, Any] = strict_yaml.parse(text)["concepts"]
    for number, (name, values) in enumerate(entries.items()):
        preset = entry.with_concept(preset, name, values, only=number == 0)
    return _without_unknown_tokens(preset, [Concept.model_validate(values) for values in entries.values()])


def _without_unknown_tokens(text: str, concepts: Sequence[Concept]) -> str:
    """The text without the validation prompts that name a token which no concept has."""
    node: Any = yaml.compose(text, yaml.SafeLoader)
    for key in ("train", "validation", "prompts"):
        node = entry.find(node, key)
    prompts = [each.value for each in node.value] if isinstance(node, yaml.SequenceNode) else []
    kept = [prompt for prompt in prompts if not unknown_tokens(prompt, concepts)]
    if kept == prompts:
        return text
    start, end = node.start_mark.index, len(text[: node.end_mark.index].rstrip())
    return text[:start] + json.dumps(kept, ensure_ascii=False) + text[end:]
