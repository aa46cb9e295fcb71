"""Typed contents of adapter.json: base model, concepts and training settings."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from customdiff.config import Base
from customdiff.config.section import ConceptName, ModifierToken
from customdiff.errors import UserError

CONFIG_FILE = "adapter.json"
_BASE_KEYS = {"model", "revision", "variant"}


class _Part(BaseModel):
    # Unknown keys, such as those of a later version, are preserved when the file is written again.
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class BaseModelReference(_Part):
    """Folder or Hub repository of the base model, with revision and variant."""

    model: str
    revision: str | None = None
    variant: str | None = None


class LearnedConcept(_Part):
    """One concept of an adapter.

    Attributes:
        modifier_token: token of the concept, such as `<new1>`.
        class_prompt: class of the concept; empty if an imported file does not name it.
        instance_prompt: caption template with {} for the token.
        initializer: words whose mean embedding initialized the token; None for imported adapters.
    """

    modifier_token: ModifierToken
    class_prompt: str = ""
    instance_prompt: str = "{}"
    initializer: str | None = None

    @property
    def subject(self) -> str:
        """Token and class as prompts name the concept: `<new1> cat`."""
        return f"{self.modifier_token} {self.class_prompt}".strip()


class Compression(_Part):
    """Low-rank storage of weights: rank of each weight and dtype of the factors."""

    ranks: list[int]
    dtype: str = "float32"


class AdapterConfig(_Part):
    """The contents of adapter.json.

    Attributes:
        base: the base model that the adapter was trained on.
        concepts: learned concepts by name.
        method, freeze_model, lora_rank: trained weights, as in section `train` of params.yaml. Old adapters have no
            `method`, which means custom_diffusion.
        family: `Stable Diffusion 1.x`, `2.x` or `XL`; None in old adapters.
        processors: names of all attention processors of the UNet, in its order.
        fingerprint: samples of the base model's weights; see `adapter.fingerprint`.
        compressed: set if weights are stored as low-rank factors.
        imported: format, name and SHA-256 of the file of an imported adapter.
        merged_from: tokens, steps and seed of each source of a merged adapter.
    """

    base: BaseModelReference
    concepts: dict[ConceptName, LearnedConcept] = Field(min_length=1)
    method: Literal["custom_diffusion", "textual_inversion", "lora"] = "custom_diffusion"
    freeze_model: Literal["crossattn_kv", "crossattn"] = "crossattn_kv"
    lora_rank: int | None = Field(None, ge=1, le=4096)
    resolution: int | None = None
    steps: int | None = None
    seed: int | None = None
    versions: dict[str, str] = {}
    family: str | None = None
    processors: list[str] = []
    fingerprint: list[float] = []
    compressed: Compression | None = None
    imported: dict[str, str] | None = None
    merged_from: list[dict] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterConfig":
        tokens = [token.casefold() for token in self.tokens]
        if len(set(tokens)) < len(tokens):
            raise ValueError("two concepts have the same modifier_token")
        if self.method == "lora" and self.lora_rank is None:
            raise ValueError("lora_rank is missing")
        return self

    @property
    def tokens(self) -> list[str]:
        """Modifier tokens, in the order of the concepts."""
        return [concept.modifier_token for concept in self.concepts.values()]

    def base_model(self, override: str | None = None) -> Base:
        """The base model to load: the folder or Hub repository `override`, or by default the one the adapter names.

        Raises:
            UserError: neither names a model.
        """
        try:
            return Base(model=override) if override else Base.model_validate(self.base.model_dump(include=_BASE_KEYS))
        except ValidationError as error:
            raise UserError(f"the adapter's base model is invalid ({_first(error)}); name it with --base") from error

    def with_changes(self, **changes: object) -> "AdapterConfig":
        """A validated copy with some fields replaced."""
        return AdapterConfig.model_validate(self.model_dump(exclude_unset=True) | changes)

    def to_json(self) -> str:
        """The text of adapter.json, with only the fields that were set."""
        return self.model_dump_json(indent=2, exclude_unset=True) + "\n"


def read_config(folder: Path | str) -> AdapterConfig:
    """Read adapter.json in an adapter's folder.

    Raises:
        UserError: the file is missing, or a key of it is invalid.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():  # reading a pipe or a device would never end
            raise OSError("not a file")
        return AdapterConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: no adapter found; give the folder of one, such as models/adapter") from error
    except ValidationError as error:
        raise UserError(f"{path}: invalid ({_first(error)}); train again with `dvc repro`") from error


def _first(error: ValidationError) -> str:
    """The first of the problems: key and message."""
    problem = error.errors(include_input=False, include_url=False)[0]
    key = ".".join(" ".join(str(part).split()) for part in problem["loc"])
    return f"{key}: {problem['msg']}" if key else problem["msg"]
