"""Evaluation prompts: read from files, and filled in with subjects."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from customdiff.config import Concept, unknown_tokens
from customdiff.errors import UserError

KINDS = ("scene", "companion", "style", "property")
JOINT_FILE = "together.txt"
MAX_FILE_NAME = 60  # characters of a class in a file name, which has at most 255 bytes
JOIN = "+"  # between the names of a prompt's concepts in files; no concept name contains it


@dataclass(frozen=True)
class Prompt:
    """A prompt template about one concept, or about several in one image.

    Attributes:
        template: text with {} for the subject; with {1}, {2} and so on for several, in the order of `concepts`.
        concepts: names of the concepts that the prompt is about; none for a prompt of other things.
        kind: what it asks for: one of `KINDS`, or `other`.
    """

    template: str
    concepts: tuple[str, ...]
    kind: str = "other"

    @property
    def concept_label(self) -> str:
        """The names of its concepts in one string: `cat`, or `cat+teapot`."""
        return JOIN.join(self.concepts)

    def fill(self, *subjects: str) -> str:
        """The text of the prompt about these subjects, one per concept."""
        numbered = {f"{{{number}}}": subject for number, subject in enumerate(subjects, 1)} | {
            "{}": "".join(subjects[:1])
        }
        return re.sub(r"\{\d*\}", lambda found: numbered.get(found[0], found[0]), self.template)


def read_all_prompts(folder: Path | str, concepts: Mapping[str, Concept]) -> list[Prompt]:
    """The prompts of each concept, then those that show all concepts in one image, where there are any.

    Raises:
        UserError: a prompt file is missing, empty, or has a line without its placeholders, or with an unknown token.
    """
    prompts = [prompt for name in concepts for prompt in read_prompts(folder, name, concepts)]
    return prompts + read_joint_prompts(folder, concepts)


def check_grading_prompts(grading: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Refuse prompts for the selection of checkpoints by which the adapter is evaluated as well.

    Raises:
        UserError: `train.grading.prompts` has an evaluation prompt; the figures would be too good.
    """
    evaluated = {prompt.template for prompt in prompts}
    if shared := [prompt for prompt in grading if prompt in evaluated]:
        raise UserError(
            f"train.grading.prompts: {shared[0]!r} is an evaluation prompt as well; select checkpoints by other prompts"
        )


def read_prompts(folder: Path | str, name: str, concepts: Mapping[str, Concept]) -> list[Prompt]:
    """The prompts of the concept `name`: those of `<class_prompt>.txt`, spaces as _, or else of `default.txt`.

    The file has one prompt per line, as `kind: prompt` or only the prompt, with {} for the subject; # starts a comment.

    Raises:
        UserError: there is no file, it is empty, or a line lacks {} or names a modifier token that no concept has.
    """
    concept = concepts[name]
    file = re.sub(r"[ /\\]", "_", concept.class_prompt)[:MAX_FILE_NAME]
    own, default = Path(folder, f"{file}.txt"), Path(folder, "default.txt")
    path = own if own.is_file() else default
    try:
        if not path.is_file():
            raise FileNotFoundError(path)
        prompts = _read_lines(path, ["{}"], (name,), concepts)
    except OSError as error:
        raise UserError(f"evaluate.prompts: neither {own.name} nor default.txt can be read in {folder}") from error
    if not prompts:
        raise UserError(f"{path}: has no prompts; write one per line, such as `scene: a {{}} on the grass`")
    return prompts


def read_joint_prompts(folder: Path | str, concepts: Mapping[str, Concept]) -> list[Prompt]:
    """Prompts that show all concepts in one image, {1} to {N}: the lines of `together.txt` with exactly N placeholders.

    Raises:
        UserError: a line lacks {1} or {2}, or names a modifier token that no concept has.
    """
    path = Path(folder, JOINT_FILE)
    if len(concepts) < 2 or not path.is_file():
        return []
    *wanted, too_many = (f"{{{number}}}" for number in range(1, len(concepts) + 2))
    return [
        prompt
        for prompt in _read_lines(path, wanted[:2], tuple(concepts), concepts)
        if all(each in prompt.template for each in wanted) and too_many not in prompt.template
    ]


def _read_lines(
    path: Path, placeholders: Sequence[str], names: tuple[str, ...], concepts: Mapping[str, Concept]
) -> list[Prompt]:
    """The prompts of a file, each about the concepts `names`."""
    prompts: list[Prompt] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"evaluate.prompts: {path} is not UTF-8; save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        kind, colon, rest = text.partition(":")
        has_kind = bool(colon) and kind in KINDS
        prompt = Prompt(rest.strip(), names, kind) if has_kind else Prompt(text, names)
        for placeholder in placeholders:
            if placeholder not in prompt.template:
                raise UserError(
                    f"{path}: line {number}: lacks {placeholder}, the placeholder of the subject (here: {text!r})"
                )
        if unknown := unknown_tokens(text, concepts.values()):
            tokens = ", ".join(concept.modifier_token for concept in concepts.values())
            raise UserError(
                f"{path}: line {number}: names {unknown[0]}, which no concept has (modifier tokens: {tokens}); "
                f"write {' and '.join(placeholders)} for the subject (here: {text!r})"
            )
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts
