"""YAML without surprises: the numbers of YAML 1.2, as DVC reads them, unique keys, and limits on size and depth."""

import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_KEYS = 10_000  # of one mapping, after merge keys have been resolved


def parse(text: str) -> Any:
    """Parse YAML into dicts, lists, strings, numbers, booleans and None.

    `010`, `1:30` and `yes` are strings here, and `1e-5` is a number. (YAML 1.1 reads them as 8, 90, true, and text.)

    Raises:
        ValueError: it is not valid YAML; the message is one line.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"longer than {MAX_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # PyYAML's constructors of explicit tags
        raise ValueError(f"a value does not have the type of its tag ({' '.join(str(error).split())[:100]})") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with other implicit types and limits."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH}", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a word", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:  # PyYAML silently keeps the last
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:  # a few merge keys of merge keys can stand for billions
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_KEYS:,} keys", node.start_mark)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,99})", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
