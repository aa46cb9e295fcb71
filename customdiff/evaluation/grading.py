"""All figures of an adapter from its images: what the stage `evaluate` reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from customdiff.config import Params
from customdiff.evaluation import drift, holdout
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import DIGITS
from customdiff.evaluation.scores import PromptScore, Summary, photo_ceilings, score_prompts, summarize
from customdiff.sources.instance_images import read_instance_images


@dataclass(frozen=True)
class Photos:
    """The real images that figures compare with, by concept.

    Attributes:
        instances: what was trained on.
        holdout: what was not; only of concepts that have some.
        classes: class images; only of concepts that have some.
    """

    instances: Mapping[str, Sequence[Image.Image]]
    holdout: Mapping[str, holdout.Holdout]
    classes: Mapping[str, Sequence[Image.Image]]

    @classmethod
    def read(cls, params: Params, data: Path = Path("data")) -> "Photos":
        """The photos that the stages before have written to the folder `data`, and the holdout photos.

        Raises:
            UserError: an image is missing or damaged, or the holdout photos are not usable; see `holdout.read`.
        """
        instances = {name: read_instance_images(data / "instances" / name) for name in params.concepts}
        kept_out = holdout.read_all(params.concepts, params.download, instances)
        classes = drift.read_class_images(data / "classes", params.concepts) if params.evaluate.drift_prompts else {}
        return cls(instances, kept_out, classes)


def grade(
    pairs: Sequence[ImagePair], photos: Photos, judges: Judges, params: Params
) -> tuple[list[PromptScore], Summary]:
    """Score the images of an adapter and of the base model.

    Args:
        pairs: of the concepts' prompts, and controls (`drift.control_prompts`).

    Returns:
        One score per prompt of a concept, and the contents of metrics.json.
    """
    resampled = {"resamples": params.evaluate.bootstrap, "seed": params.base.seed}
    own = [pair for pair in pairs if not pair.is_control]
    controls = [pair for pair in pairs if pair.is_control]
    scored = score_prompts(own, photos.instances, judges)
    cutouts = judges.cutouts
    unmasked = round(cutouts.whole / cutouts.total, DIGITS) if cutouts and cutouts.total else None
    summary = summarize(
        scored,
        len(own),
        **resampled,
        ceilings=photo_ceilings(photos.instances, judges),
        holdout=holdout.figures(photos.holdout, photos.instances, judges),
        figures=drift.figures(controls, photos.classes, judges, **resampled),
        unmasked=unmasked,
    )
    return scored, summary
