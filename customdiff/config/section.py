"""Base class and shared types of the sections of params.yaml."""

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from customdiff.errors import UNPRINTABLE, UserError

ConceptName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=64)]
Fraction = Annotated[float, Field(ge=0, le=1)]
RESERVED_TOKENS = ("pytorch_custom_diffusion_weights", "pytorch_lora_weights", "compressed_weights")


def _not_reserved(token: str) -> str:
    if token.lower() in RESERVED_TOKENS:
        raise ValueError(f"{token} is the name of a file of adapters; use a token such as <new1>")
    return token


# Also a file name; with 4 bytes per character and the suffix it stays below the 255 bytes of file systems.
ModifierToken = Annotated[str, Field(pattern=r"^[^\s/\\.][^\s/\\]*$", max_length=50), AfterValidator(_not_reserved)]
SamplerSteps = Annotated[int, Field(ge=1, le=1000)]  # the time steps of the models' noise schedules
Seconds = Annotated[float, Field(gt=0, le=86_400)]
LARGEST_INTEGER, LARGEST_NUMBER = 2**32, 1e12  # far above all useful values, and below what libraries overflow at


class ParamsError(UserError):
    """Invalid params.yaml; the message has one line per wrong key."""


class Section(BaseModel):
    """A section of params.yaml.

    Unknown keys, values of another type, infinities, NaN, absurdly large numbers, and control characters are errors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, strict=True)

    @field_validator("*", mode="after")
    @classmethod
    def _sensible(cls, value: Any) -> Any:
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and ("\n" in part or UNPRINTABLE.search(part)):
                raise ValueError("contains a line break or another character that cannot be printed")
            if isinstance(part, int | float) and abs(part) > (
                LARGEST_INTEGER if isinstance(part, int) else LARGEST_NUMBER
            ):
                raise ValueError(f"too large (here: {part:.3g})")
        return value


def web_address(url: str | None) -> str | None:
    """The address, for validators.

    Raises:
        ValueError: it has no host or an invalid port. The message does not quote it, because it may contain a password.
    """
    try:
        valid = url is None or (bool(urlsplit(url).hostname) and urlsplit(url).port != 0)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("is not an address such as https://host/path; encode special characters of a password as %40")
    return url
