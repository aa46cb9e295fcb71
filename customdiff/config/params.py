"""Loading and validation of params.yaml, with one error line per wrong key."""

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from customdiff.config import strict_yaml
from customdiff.config.base import Base
from customdiff.config.concepts import Concept, unknown_tokens
from customdiff.config.download import Download
from customdiff.config.evaluate import Evaluate
from customdiff.config.prepare import Prepare
from customdiff.config.retrieve import Retrieve
from customdiff.config.section import ConceptName, ParamsError, Section
from customdiff.config.tracking import Tracking
from customdiff.config.train import Train


class Params(Section):
    """All of params.yaml."""

    base: Base = Base()
    concepts: dict[ConceptName, Concept] = Field(min_length=1)
    download: Download = Download()
    retrieve: Retrieve = Retrieve()
    prepare: Prepare = Prepare()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @property
    def validation_prompts(self) -> list[str]:
        """`train.validation.prompts`, those with {} once for every concept with its subject, such as `<new1> cat`."""
        prompts: list[str] = []
        for prompt in self.train.validation.prompts:
            prompts += (
                [prompt.replace("{}", each.subject) for each in self.concepts.values()] if "{}" in prompt else [prompt]
            )
        return prompts

    @property
    def evaluation_segmenter(self) -> str | None:
        """Folder or Hub repository of the segmenter that cuts out subjects for evaluation; None if it is not used."""
        if self.evaluate.masked is False:
            return None
        return self.prepare.segmentation_model or (self.prepare.segmenter if self.evaluate.masked else None)

    @model_validator(mode="after")
    def _distinct_tokens(self) -> "Params":
        tokens = [concept.modifier_token for concept in self.concepts.values()]
        folded = [token.casefold() for token in tokens]  # some file systems ignore case
        for token in tokens:
            if folded.count(token.casefold()) > 1:
                raise ValueError(f"concepts: modifier_token {token} is used twice; give each concept its own")
        return self

    @model_validator(mode="after")
    def _known_tokens(self) -> "Params":
        prompts = {"validation": self.train.validation.prompts, "grading": self.train.grading.prompts}
        for section, prompt in ((section, prompt) for section, found in prompts.items() for prompt in found):
            if unknown := unknown_tokens(prompt, self.concepts.values()):
                tokens = ", ".join(concept.modifier_token for concept in self.concepts.values())
                raise ValueError(
                    f"train.{section}.prompts: {prompt!r} names {unknown[0]}, which no concept has (modifier tokens: "
                    f"{tokens}); {{}} stands for every concept in turn"
                )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and validate a params file.

    Raises:
        ParamsError: the file is missing, is not YAML, or has unknown keys or values out of range.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(
            f"{path}: cannot be read ({error}); run in the project folder, or `customdiff preset NAME --install`"
        ) from error
    return parse(text, path)


def parse(text: str, path: Path | str = "params.yaml") -> Params:
    """Validate the text of a params file; `path` is its name in errors.

    Raises:
        ParamsError: the text is not YAML, or has unknown keys or values out of range.
    """
    try:
        raw = strict_yaml.parse(text)
    except ValueError as error:
        raise ParamsError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: must contain sections such as base:, concepts: and train:")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from error


def with_evaluation(params: Params, **changes: int | None) -> Params:
    """Parameters with other values in section `evaluate`; None leaves a value unchanged."""
    given = {name: value for name, value in changes.items() if value is not None}
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update=given)})


def concept(params: Params, name: str) -> Concept:
    """The concept with this name.

    Raises:
        ParamsError: there is none.
    """
    if name not in params.concepts:
        raise ParamsError(f"concepts: {name!r} is not in params.yaml, which has {', '.join(params.concepts)}")
    return params.concepts[name]


def stage_concept(params: Params, arguments: Sequence[str]) -> tuple[str, Concept]:
    """Name and section of the concept that a stage runs for.

    Args:
        arguments: of the stage script: the name, or nothing if DVC runs it, which sets DVC_STAGE to `<stage>@<name>`.

    Raises:
        ParamsError: there is no such concept.
    """
    name = arguments[0] if arguments else os.environ.get("DVC_STAGE", "").partition("@")[2]
    return name, concept(params, name)


def _explain(problem: ErrorDetails) -> str:
    """One line for one pydantic error: the key, what is wrong and what would be right."""
    *parents, key = problem["loc"] or ("",)
    path = ".".join(" ".join(str(part).split()) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(parents)
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        return f"{path}: unknown key; " + (f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}")
    if problem["type"] == "missing":
        return f"{path}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}" if path else message
    here = "" if key == "url" else f" (here: {reprlib.repr(problem['input'])})"  # an address may contain a password
    return f"{path}: {message[0].lower()}{message[1:]}{here}"


def _keys_at(parents: Sequence[int | str]) -> list[str]:
    """Valid keys of the section at the path `parents`."""
    model: type[Section] = Params
    for part in parents:
        if part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
            candidates = (annotation, *get_args(annotation))
            model = next((a for a in candidates if isinstance(a, type) and issubclass(a, Section)), model)
    return list(model.model_fields)
