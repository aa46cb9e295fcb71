"""Base class and shared types of the sections of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from customdiff.errors import UserError

ConceptName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ParamsError(UserError):
    """Invalid params.yaml; the message has one line per wrong key."""


class Section(BaseModel):
    """A section of params.yaml: unknown keys, infinities and NaN are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
