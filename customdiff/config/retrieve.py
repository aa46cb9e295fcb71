"""Section `retrieve` of params.yaml: class images for prior preservation."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from customdiff.config.section import Fraction, SamplerSteps, Seconds, Section, web_address


class Index(Section):
    """Backend index: clip-retrieval over a pool of captioned images."""

    pool: str = Field("data/pool", description="Folder of images with .txt captions, or of webdataset tars.")
    clip: str = Field("data/clip", description="CLIP folder or Hub repository that embeds pool and query.")


class Service(Section):
    """Backend service: a clip-retrieval HTTP service (`clip-retrieval back`)."""

    url: str = Field("http://127.0.0.1:1234/knn-service", pattern=r"^https?://", description="Address of knn-service.")
    index_name: str = Field("laion5B-L-14", description="Index to search.")
    clip: str | None = Field(
        None, description="CLIP folder or Hub repository that embeds the query; null: the service embeds the text."
    )
    timeout: Seconds = Field(20, description="Seconds without data per request; a request may take twice as long.")
    retries: int = Field(3, ge=0, le=100, description="Retries per request, with growing pauses.")
    parallel: int = Field(8, ge=1, le=64, description="Concurrent image downloads.")

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str | None:
        return web_address(url)


class Generate(Section):
    """Backend generate, and fill: the base model generates class images from the class prompt."""

    steps: SamplerSteps = Field(50, description="Sampler steps.")
    guidance_scale: float = Field(7.5, ge=0, description="Scale of classifier-free guidance.")
    batch_size: int = Field(4, ge=1, description="Images generated at a time.")
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="Precision of the weights.")


class Retrieve(Section):
    """retrieve-class-images: images of the class, for prior preservation."""

    backend: Literal["index", "service", "generate", "folder"] = Field("index", description="Source of class images.")
    num_class_images: int = Field(200, ge=1, description="Class images per concept.")
    minimum: int = Field(
        50, ge=1, description="Fewer class images are an error; fewer than num_class_images are a warning."
    )
    duplicate_similarity: Fraction = Field(0.98, description="Cosine from which two images count as duplicates.")
    min_similarity: Fraction | None = Field(
        None,
        description="Backends index and service: an image is kept if its caption names the class or its cosine to the "
        "query is at least this; 1: the caption must name the class; null: no floor, as in the reference.",
    )
    fill: Literal["generate", "none"] = Field(
        "none",
        description="If fewer than num_class_images are found: generate (the base model generates the rest) or none.",
    )
    caption_weight: Fraction = Field(
        0.0, description="Backend index: weight of the caption in the ranking; 0: image only, as in the reference."
    )
    index: Index = Index()
    service: Service = Service()
    generate: Generate = Generate()
    folder: str = Field(
        "data/class-images/{}", description="Backend folder: images with .txt captions; {} stands for the concept."
    )

    @property
    def generates(self) -> bool:
        """Whether the base model may generate class images."""
        return self.backend == "generate" or self.fill == "generate"

    @model_validator(mode="after")
    def _minimum_fits(self) -> "Retrieve":
        if self.minimum > self.num_class_images:
            raise ValueError(f"minimum ({self.minimum}) is above num_class_images ({self.num_class_images})")
        return self
