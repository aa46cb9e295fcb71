"""Section `download` of params.yaml: limits on downloaded images, which are untrusted."""

from pydantic import Field

from customdiff.config.section import Section


class Download(Section):
    """Limits of download-data and retrieve-class-images."""

    minimum: int = Field(4, ge=1, description="Fewer good instance images are an error.")
    maximum: int = Field(100, ge=1, description="More instance images are an error: they are hardly one subject.")
    max_megapixels: float = Field(64, gt=0, description="Per image, checked before it is decoded.")
    max_megabytes: float = Field(1024, gt=0, description="Per archive, packed and unpacked alike.")
    max_side: int = Field(2048, ge=64, description="px; larger images are scaled down when they are stored.")
    timeout: float = Field(30, gt=0, description="Seconds without data after which a download fails.")
