"""Section `concepts` of params.yaml: one entry per subject."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from pydantic import Field, field_validator, model_validator

from customdiff.config.section import ModifierToken, Section, web_address

TOKEN = re.compile(r"<[^\s<>]+>")  # `<new1>`; "a < b" and "<two words>" are text


def unknown_tokens(text: str, concepts: Iterable["Concept"]) -> list[str]:
    """Words of the form `<new1>` in a text that are the modifier token of no concept."""
    tokens = [concept.modifier_token for concept in concepts]
    for token in sorted((token for token in tokens if "<" in token), key=len, reverse=True):
        text = text.replace(token, " ")
    return TOKEN.findall(text)


class Source(Section):
    """Where a concept's instance images come from: exactly one of `path`, `url` and `hub`."""

    path: str | None = Field(None, description="Folder of images, or a zip or tar archive.")
    url: str | None = Field(None, pattern=r"^https://", description="https address of a zip or tar archive.")
    hub: str | None = Field(None, pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="Hugging Face data set, owner/name.")
    revision: str | None = Field(None, description="Branch, tag or commit of `hub`.")
    split: str = Field("train", description="Split of `hub`.")
    subfolder: str | None = Field(None, description="Folder of the images inside the archive or folder.")
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$", description="Checksum of the archive.")

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        named = [name for name in ("path", "url", "hub") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"set exactly one of path, url and hub (here: {', '.join(named) or 'none'})")
        return self

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str | None) -> str | None:
        return web_address(url)

    @field_validator("subfolder")
    @classmethod
    def _inside(cls, subfolder: str | None) -> str | None:
        if subfolder is not None and (PurePath(subfolder).is_absolute() or ".." in PurePath(subfolder).parts):
            raise ValueError("must be a folder inside the source, without ..")
        return subfolder


class Concept(Section):
    """One subject to learn."""

    source: Source
    modifier_token: ModifierToken = Field(description="New token that means this subject, such as <new1>.")
    class_prompt: str = Field(min_length=1, description="Class of the subject, such as cat.")
    instance_prompt: str = Field(description="Caption of instance images; {} stands for the modifier token.")
    initializer_token: str | None = Field(
        None,
        min_length=1,
        description="Words whose mean embedding the token starts from; null: class_prompt.",
    )
    holdout: str | None = Field(
        None,
        min_length=1,
        description="Folder of at least two photos of the subject that are kept out of training, for evaluation.",
    )

    @field_validator("instance_prompt")
    @classmethod
    def _has_placeholder(cls, prompt: str) -> str:
        if prompt.count("{}") != 1:
            raise ValueError("must contain {} once, where the modifier token goes, as in 'photo of a {} cat'")
        return prompt

    @property
    def caption(self) -> str:
        """The instance prompt with the modifier token: `photo of a <new1> cat`."""
        return self.instance_prompt.replace("{}", self.modifier_token)

    @property
    def subject(self) -> str:
        """What {} in a prompt stands for: `<new1> cat`."""
        return f"{self.modifier_token} {self.class_prompt}"
