"""Section `download` of params.yaml: limits on downloaded images, which are untrusted."""

from pydantic import Field, model_validator

from customdiff.config.section import Seconds, Section


class Download(Section):
    """Limits of download-data and retrieve-class-images."""

    minimum: int = Field(4, ge=1, description="Minimum number of usable instance images.")
    maximum: int = Field(100, ge=1, description="Maximum number of instance images; more are rarely of one subject.")
    max_megapixels: float = Field(64, gt=0, description="Maximum megapixels per image, checked before decoding.")
    max_megabytes: float = Field(1024, gt=0, description="Maximum megabytes per archive, packed and unpacked.")
    max_side: int = Field(2048, ge=64, description="Maximum side in px; larger images are scaled down.")
    timeout: Seconds = Field(30, description="Seconds without data after which a download fails.")
    deadline: Seconds = Field(3600, description="Seconds for a whole download.")

    @model_validator(mode="after")
    def _minimum_fits(self) -> "Download":
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) is above maximum ({self.maximum})")
        return self
