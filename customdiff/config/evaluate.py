"""Section `evaluate` of params.yaml: prompts, sampler and judge."""

from typing import Literal

from pydantic import Field

from customdiff.config.section import Fraction, SamplerSteps, Section


class Evaluate(Section):
    """evaluate: the figures of the adapter beside those of the base model (section 4 of the paper)."""

    prompts: str = Field("data/prompts", description="Folder of <class>.txt or default.txt; {} stands for the subject.")
    num_images: int = Field(4, ge=1, description="Images per prompt and noise seed.")
    seeds: int = Field(
        1,
        ge=1,
        description="Noise seeds: every prompt is generated from base.seed, base.seed + 1, ...; with two or more, "
        "intervals are over prompts and seeds.",
    )
    batch_size: int = Field(8, ge=1, description="Images generated at a time.")
    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "euler", "base"] = Field(
        "ddim", description="Sampler; base: the model's own."
    )
    steps: SamplerSteps = Field(100, description="Sampler steps.")
    guidance_scale: float = Field(6.0, ge=0, description="Scale of classifier-free guidance.")
    eta: Fraction = Field(1.0, description="Noise of ddim; other samplers ignore it.")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Precision of the weights.")
    clip: str = Field("openai/clip-vit-base-patch32", description="Judge: CLIP folder or Hub repository.")
    identity: str | None = Field(
        None,
        min_length=1,
        description="Vision transformer that compares subjects, such as facebook/dinov2-base: folder or Hub "
        "repository; null: none.",
    )
    masked: bool | None = Field(
        None,
        description="Image alignment of the cut-out subjects as well, by the segmenter of prepare.masks (with masks: "
        "none by prepare.segmenter); null: unless prepare.masks is none.",
    )
    drift_prompts: int = Field(
        8,
        ge=0,
        description="Prompts without the token whose images are compared with the base model's: up to so many of "
        "other things (drift.txt), and as many of the class; 0: no drift and no KID of the class images.",
    )
    bootstrap: int = Field(2000, ge=100, description="Bootstrap resamples for 95 % intervals.")
