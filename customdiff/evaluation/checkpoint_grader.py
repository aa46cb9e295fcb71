"""The grader of `train.select`: similarity to the instance images, and text alignment, by the judges of `evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customdiff.config import Params
from customdiff.evaluation.metrics import image_alignment, leave_one_out_alignment, text_alignment
from customdiff.files import model_hashes, source_hash
from customdiff.models import base
from customdiff.models.clip import Clip
from customdiff.models.vision import VisionEncoder
from customdiff.sources.instance_images import read_instance_images

# The code that determines its figures, besides `customdiff.models`, which the identity of every run contains.
CODE = ("evaluation/checkpoint_grader.py", "evaluation/metrics.py")


@dataclass(frozen=True)
class CheckpointGrader:
    """Measures images of a concept; a `training.selection.Grader`.

    Holdout photos are not used: a checkpoint that was selected by them would make their figures too good.

    Attributes:
        clip: of `evaluate.clip`.
        encoder: compares subjects: `evaluate.identity`, or else `clip`.
        photos: features (M, D) of the instance images by concept, of norm 1.
        identity: see `Grader.identity`.
    """

    clip: Clip
    encoder: VisionEncoder | Clip
    photos: Mapping[str, np.ndarray]
    identity: dict[str, Any]

    @classmethod
    def load(cls, params: Params, data: Path = Path("data")) -> "CheckpointGrader":
        """Load the judges, and the instance images from the folder `data`.

        Raises:
            UserError: a judge cannot be loaded, or an image is missing or damaged.
        """
        settings, device = params.evaluate, base.device(params.base.device)
        clip = Clip.load(settings.clip, device)
        encoder = VisionEncoder.load(settings.identity, device) if settings.identity else clip
        photos = {name: encoder.images(read_instance_images(data / "instances" / name)) for name in params.concepts}
        return cls(clip, encoder, photos, identity_of(params))

    def ceilings(self) -> dict[str, float]:
        """For each concept the mean cosine of its instance images to one another, -1 to 1; 1 if there is only one."""
        found = {name: leave_one_out_alignment(features) for name, features in self.photos.items()}
        return {name: 1.0 if value is None else value for name, value in found.items()}

    def measure(self, images: Sequence[Image.Image], prompts: Sequence[str], concept: str) -> tuple[float, float]:
        """Figures of generated images.

        Args:
            images: RGB.
            prompts: of each image, without modifier tokens.

        Returns:
            Mean cosine to the instance images, -1 to 1, and mean text alignment, 0 to 2.5.
        """
        similarity = image_alignment(self.encoder.images(images), self.photos[concept])
        text = text_alignment(self.clip.images(images), self.clip.text(prompts))
        return float(similarity.mean()), float(text.mean())


def identity_of(params: Params) -> dict[str, Any]:
    """Judges, their files, and the code that determines the figures."""
    names = [name for name in (params.evaluate.clip, params.evaluate.identity) if name]
    return {"judges": {name: model_hashes(name) for name in names}, "code": source_hash(*CODE)}
