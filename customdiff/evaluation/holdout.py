"""Holdout photos: kept out of training, so that their figures say what a perfect adapter would reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from customdiff.config import Concept, Download
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import image_alignment, text_alignment
from customdiff.models.modifier_tokens import without_tokens
from customdiff.sources.holdout import read_photos, refuse_shared
from customdiff.sources.image_folder import sidecar_caption


@dataclass(frozen=True)
class Holdout:
    """The holdout photos of a concept.

    Attributes:
        images: RGB.
        captions: of the photos, without the modifier token; empty if one of them has none.
    """

    images: list[Image.Image]
    captions: list[str]


def read(name: str, concept: Concept, limits: Download, instances: Sequence[Image.Image]) -> Holdout:
    """The photos in the folder `concepts.<name>.holdout`, sized as instance images are.

    Raises:
        UserError: the folder has fewer than two photos, one cannot be read, or one is an instance image.
    """
    photos = read_photos(name, concept, limits)
    refuse_shared(name, photos, ((f"number {number}", image) for number, image in enumerate(instances, 1)))
    captions = [sidecar_caption(path) for path, _ in photos]
    subject = concept.modifier_token
    words = [without_tokens(text.replace("{}", subject), subject) for text in captions if text]
    return Holdout([image for _, image in photos], words if len(words) == len(photos) else [])


def read_all(
    concepts: Mapping[str, Concept], limits: Download, instances: Mapping[str, Sequence[Image.Image]]
) -> dict[str, Holdout]:
    """The holdout photos of each concept that names some; see `read`."""
    return {name: read(name, concept, limits, instances[name]) for name, concept in concepts.items() if concept.holdout}


def figures(
    holdout: Mapping[str, Holdout], instances: Mapping[str, Sequence[Image.Image]], judges: Judges
) -> dict[str, dict[str, float]]:
    """Metrics of each concept's holdout photos: alignments with the instance images, and with captions that of text."""
    found = {}
    for name, photos in holdout.items():
        found[name] = {
            metric: float(
                np.mean(
                    image_alignment(
                        judges.embed(metric, photos.images, name), judges.embed(metric, instances[name], name)
                    )
                )
            )
            for metric in judges.alignments
        }
        if photos.captions:
            embedded = judges.clip.images(photos.images), judges.clip.text(photos.captions)
            found[name]["text_alignment"] = float(np.mean(text_alignment(*embedded)))
    return found
