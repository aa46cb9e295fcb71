"""Section `prepare` of params.yaml: captions, subject masks, backgrounds, augmentation and VAE encoding."""

from typing import Literal

from pydantic import Field

from customdiff.config.section import Fraction, Section

Color = Literal["white", "black", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"]


class Backgrounds(Section):
    """Views of a photo that show the masked subject on another background, which their caption names."""

    share: Fraction = Field(0.75, description="Share of such views of each photo; 0: none.")
    colors: list[Color] = Field(
        ["white", "black", "grey", "yellow", "purple", "brown"], min_length=1, description="Background colors."
    )
    images: str | None = Field(
        None,
        min_length=1,
        description="Folder of images that serve as backgrounds too, each with a .txt file that names the place, such "
        "as `in the snow`.",
    )
    vary_place: bool = Field(False, description="Vary the subject's place and size in such views.")
    captioned: bool = Field(False, description="Also for photos with a sidecar caption.")


class Prepare(Section):
    """prepare: captions, the paper's augmented views of each instance image, and their VAE moments."""

    resolution: int = Field(
        512,
        ge=32,
        le=4096,
        multiple_of=8,
        description="Height and width in px; 768 for SD 2.x, 128 for the embedded model.",
    )
    captions: Literal["auto", "sidecar", "template"] = Field(
        "auto",
        description="auto: the .txt file beside a photo, else `captioner`; sidecar: a .txt file beside every photo; "
        "template: instance_prompt.",
    )
    captioner: str | None = Field(
        "data/captioner",
        min_length=1,
        description="Captioner of captions: auto; folder or Hub repository of an image-to-text model, such as BLIP; "
        "null: the template instead.",
    )
    masks: str = Field(
        "auto",
        min_length=1,
        description="Subject masks. auto: from a .mask.png beside a photo, else from its alpha channel, else from "
        "`segmenter`; none; or a segmenter's folder or Hub repository.",
    )
    segmenter: str = Field(
        "data/segmenter", description="Segmentation model of masks: auto; folder or Hub repository, such as CLIPSeg."
    )
    backgrounds: Backgrounds = Backgrounds()
    together: int = Field(
        20,
        ge=0,
        description="With several concepts: further views of each photo that show its subject cut out beside another "
        "concept's, with both in the caption; 0: none.",
    )
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

    @property
    def captioning_model(self) -> str | None:
        """Folder or Hub repository of the captioner; None if it is not used."""
        return self.captioner if self.captions == "auto" else None

    @property
    def segmentation_model(self) -> str | None:
        """Folder or Hub repository of the segmenter; None if no masks are used."""
        return None if self.masks == "none" else self.segmenter if self.masks == "auto" else self.masks
