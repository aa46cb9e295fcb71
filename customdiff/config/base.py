"""Section `base` of params.yaml: the base model, the seed and the device."""

from pydantic import Field

from customdiff.config.section import Section


class Base(Section):
    """The base model to personalize."""

    model: str = Field("data/base", min_length=1, description="Folder of a diffusers pipeline, or a Hub repository.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of every random draw in every stage.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: a GPU if there is one, else the CPU."
    )
