"""Section `prepare` of params.yaml: captions, augmentation and VAE encoding."""

from typing import Literal

from pydantic import Field

from customdiff.config.section import Section


class Prepare(Section):
    """prepare: captions, the paper's augmented views of each instance image, and their VAE moments."""

    resolution: int = Field(
        512, ge=32, multiple_of=8, description="Height and width in px; 768 for SD 2.x, 64 for the embedded model."
    )
    captions: Literal["template", "sidecar", "blip"] = Field(
        "template", description="template: instance_prompt; sidecar: a .txt file per image; blip: a BLIP model."
    )
    captioner: str = Field("Salesforce/blip-image-captioning-base", description="Captioner folder or Hub repository.")
    class_captions: Literal["real", "prompt"] = Field(
        "real", description="real: the retrieved captions (the reference's real_prior); prompt: class_prompt."
    )
    augmentation: bool = Field(True, description="The paper's random resizing; false: the reference's noaug.")
    hflip: bool = Field(False, description="Flip half of the views horizontally.")
    center_crop: bool = Field(False, description="Crop non-square images at the center instead of at random.")
    views: int = Field(40, ge=1, description="Augmented views per instance image.")
    class_views: int = Field(1, ge=1, description="Views per class image, with random crop and flip.")
    cache_latents: bool = Field(
        True, description="Store VAE moments; false: store pixels and encode them at each step."
    )
    batch_size: int = Field(4, ge=1, description="Images that the VAE encodes at a time.")
