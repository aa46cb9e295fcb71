"""A concept's entry in params.yaml, written into the file's text, so that all other text stays as it is."""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from customdiff.config import Concept, Params, unknown_tokens
from customdiff.config.section import ConceptName
from customdiff.errors import UserError

Entry = dict[str, Any]


def check_name(name: str) -> None:
    """Check a concept's name, which is also the name of a folder.

    Raises:
        UserError: it is not of lower-case letters, digits, _ and -.
    """
    try:
        TypeAdapter(ConceptName).validate_python(name)
    except ValidationError as error:
        raise UserError(f"NAME: {name!r} must be of lower-case letters, digits, _ and -, such as rex") from error


def free_token(concepts: Mapping[str, Concept]) -> str:
    """The first of `<new1>`, `<new2>`, ... that no concept has."""
    used = {concept.modifier_token for concept in concepts.values()}
    number = 1
    while f"<new{number}>" in used:
        number += 1
    return f"<new{number}>"


def new_entry(path: str, token: str, class_words: str) -> Entry:
    """The values of a concept whose photos are at `path`."""
    return {
        "source": {"path": path},
        "modifier_token": token,
        "class_prompt": class_words,
        "instance_prompt": f"photo of a {{}} {class_words}",
        "initializer_token": class_words,
    }


def with_concept(text: str, name: str, entry: Entry, *, only: bool = False) -> str:
    """The text of params.yaml with a concept more, or with another entry where it has one of this name.

    Only the entry is written; every other character stays. Modifier tokens in validation prompts become {}.

    Args:
        text: a valid params.yaml.
        only: remove all other concepts.

    Raises:
        UserError: the text cannot be edited without changing the meaning of other parts.
    """
    values = yaml.safe_load(text)
    old = {key: Concept.model_validate(value) for key, value in values["concepts"].items()}
    kept = {} if only else values["concepts"]
    values["concepts"] = {**kept, name: entry}
    edited = _with_general_prompts(text, old)
    prompts = (values.get("train") or {}).get("validation") or {}
    if prompts.get("prompts"):
        prompts["prompts"] = [_general(prompt, old) for prompt in prompts["prompts"]]
    edited = _with_entry(edited, name, entry, only=only)
    try:
        as_meant = yaml.safe_load(edited) == values
    except yaml.YAMLError:  # an alias lost its anchor
        as_meant = False
    if not as_meant:
        raise UserError(f"params.yaml: cannot be edited as it is written; add concepts.{name} by hand: {_flow(entry)}")
    return edited


def validation_prompts_of(params: Params) -> str:
    """The validation prompts, quoted, for the user."""
    return ", ".join(f"{prompt!r}" for prompt in params.train.validation.prompts) or "none"


def _with_entry(text: str, name: str, entry: Entry, *, only: bool) -> str:
    concepts = find(yaml.compose(text, yaml.SafeLoader), "concepts")
    assert isinstance(concepts, yaml.MappingNode)  # checked by the schema
    nodes = [(key.value, key, value) for key, value in concepts.value]
    if concepts.flow_style:
        new, separator = f"{json.dumps(name)}: {_flow(entry)}", ", "
    else:
        indent = " " * nodes[0][1].start_mark.column
        lines = yaml.safe_dump({name: entry}, sort_keys=False, allow_unicode=True, width=1e9).splitlines()
        newline = "\r\n" if "\r\n" in text else "\n"
        new, separator = (newline + indent).join(lines), newline + indent
    spans = {key: _span(text, node, value, whole_lines=not concepts.flow_style) for key, node, value in nodes}
    first, last = next(iter(spans.values())), list(spans.values())[-1]
    if only:
        return text[: first[0]] + new + text[last[1] :]
    if name in spans:
        start, end = spans[name]
        return text[:start] + new + text[end:]
    return text[: last[1]] + separator + new + text[last[1] :]


def _span(text: str, key: yaml.Node, value: yaml.Node, *, whole_lines: bool) -> tuple[int, int]:
    """First and last index of a key and its value, in block style to the end of the last line with a value."""
    while isinstance(value, yaml.CollectionNode) and not value.flow_style and value.value:
        last = value.value[-1]
        value = last[1] if isinstance(last, tuple) else last
    end = max(key.end_mark.index, value.end_mark.index)
    if whole_lines:
        end = len(text[:end].rstrip())
        end += len(re.match(r"[^\r\n]*", text[end:])[0])  # type: ignore[index]  # matches any text
    return key.start_mark.index, end


def _with_general_prompts(text: str, concepts: Mapping[str, Concept]) -> str:
    """The text with {} instead of the modifier token of one concept in each validation prompt."""
    prompts: Any = yaml.compose(text, yaml.SafeLoader)
    for key in ("train", "validation", "prompts"):
        prompts = find(prompts, key)
    for node in reversed(prompts.value if isinstance(prompts, yaml.SequenceNode) else []):
        general = _general(node.value, concepts)
        if general != node.value:
            start, end = node.start_mark.index, node.end_mark.index
            tail = text[len(text[:end].rstrip()) : end]  # newlines after a block scalar belong to it
            text = text[:start] + json.dumps(general, ensure_ascii=False) + tail + text[end:]
    return text


def _general(prompt: str, concepts: Mapping[str, Concept]) -> str:
    """A prompt about one concept with {} in its place; prompts about none or several stay."""
    tokens = {concept: rf"(?<!\w){re.escape(concept.modifier_token)}(?!\w)" for concept in concepts.values()}
    named = [concept for concept, pattern in tokens.items() if re.search(pattern, prompt)]
    if len(named) != 1 or unknown_tokens(prompt, named):
        return prompt
    return re.sub(tokens[named[0]], "{}", prompt.replace(named[0].subject, "{}"))


def find(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """The value of a key in a mapping; None if there is no such key, or no mapping."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for each, value in pairs if each.value == key), None)


def _flow(entry: Entry) -> str:
    return json.dumps(entry, ensure_ascii=False)
