"""Grades of checkpoints during a training: which checkpoint becomes the adapter, and when the training stops early."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import harmonic_mean
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.config import Params
from customdiff.models import sampling
from customdiff.tracking import Tracker
from customdiff.training import validation

MIN_ROOM = 0.05  # between base model and photos; below it the grader hardly tells them apart


class Grader(Protocol):
    """What compares the images of a checkpoint with the photos and the prompts."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines its figures, for the identity of the run."""

    def ceilings(self) -> dict[str, float]:
        """For each concept the similarity of its photos to one another, which a perfect adapter would reach."""

    def measure(self, images: Sequence[Image.Image], prompts: Sequence[str], concept: str) -> tuple[float, float]:
        """Mean similarity of images to the photos of a concept, and mean text alignment with prompts without tokens."""


@dataclass(frozen=True)
class Grade:
    """The grade of a checkpoint: means over concepts.

    Attributes:
        step: after which it was saved.
        identity: similarity to the instance images.
        text_alignment: with the prompts, without modifier tokens.
        identity_share: how far `identity` came from the base model to the photos, 0 to 1.
        text_share: `text_alignment` relative to that of the base model, 0 to 1.
        score: weighted harmonic mean of the two shares, 0 to 1.
    """

    step: int
    identity: float
    text_alignment: float
    identity_share: float
    text_share: float
    score: float

    def to_dict(self) -> dict[str, float]:
        """The grade as it is in metrics.json."""
        return {name: value if name == "step" else round(value, 6) for name, value in asdict(self).items()}


def shares(identity: float, text: float, base: tuple[float, float], ceiling: float) -> tuple[float, float]:
    """Identity share and text share of one concept; see `Grade`.

    Args:
        identity, text: similarity to the photos, and text alignment.
        base: the same of the base model.
        ceiling: similarity of the photos to one another.
    """
    way = (identity - base[0]) / max(ceiling - base[0], MIN_ROOM)
    kept = text / base[1] if base[1] > 0 else 1.0
    return min(max(way, 0.0), 1.0), min(max(kept, 0.0), 1.0)


def latest_good(grades: Sequence[Grade], tolerance: float) -> Grade | None:
    """The latest grade whose score is within the tolerance of the highest; None of none.

    A score of few images is noisy. A single high one would otherwise select a checkpoint at which the subject is half
    learned.
    """
    highest = max((grade.score for grade in grades), default=0.0)
    return next((grade for grade in reversed(grades) if grade.score >= highest - tolerance), None)


@dataclass
class Selection:
    """The grades of a run so far.

    Attributes:
        measured: for each graded step and concept the similarity to the photos and the text alignment; step 0 is the
            base model. The state of a checkpoint contains it.
    """

    params: Params
    grader: Grader | None
    measured: list[dict[str, Any]] = field(default_factory=list)

    def is_graded(self, step: int) -> bool:
        """Whether a grade of this step exists, or none is due."""
        return not self.grader or any(row["step"] == step for row in self.measured)

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint of this step is graded: every one that a run without interruptions saves."""
        train = self.params.train
        return bool(self.grader) and (step % train.checkpointing_steps == 0 or step == train.max_steps)

    def grade(self, pipe: DiffusionPipeline, step: int, tracker: Tracker, accelerator: Accelerator) -> None:
        """Generate images with the current weights in the main process, measure and log them.

        Args:
            step: after which; 0: the base model, which is given the class instead of the modifier token.
        """
        row: list[dict | None] = [self._measure(pipe, step, tracker) if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(row)
        self.measured.append(row[0] or {})
        if step and accelerator.is_main_process:
            values = self.grades()[-1].to_dict()
            tracker.metrics({f"grade/{name}": value for name, value in values.items() if name != "step"}, step=step)

    def _measure(self, pipe: DiffusionPipeline, step: int, tracker: Tracker) -> dict[str, Any]:
        assert self.grader
        settings, row = self.params.train.grading, {}
        for name, concept in self.params.concepts.items():
            subject = concept.subject if step else concept.class_prompt
            texts = [prompt.replace("{}", concept.class_prompt) for prompt in settings.all_prompts]
            titles = [prompt.replace("{}", subject) for prompt in settings.all_prompts]
            seeds = [sampling.image_seed(self.params.base.seed, "grading", name, i) for i in range(len(titles))]
            images = validation.sample(pipe, titles, seeds, settings, self.params.prepare.resolution)
            row[name] = [float(figure) for figure in self.grader.measure(images, texts, name)]
            for number, (title, image) in enumerate(zip(titles, images, strict=True)):
                tracker.image(image, f"grade/{title} ({number + 1})", step=step)
        return {"step": step, "concepts": row}

    def grades(self) -> list[Grade]:
        """The grades so far, by step."""
        if not self.grader or not self.measured:
            return []
        ceilings, base = self.grader.ceilings(), self.measured[0]["concepts"]
        return [self._grade(row["step"], row["concepts"], base, ceilings) for row in self.measured[1:]]

    def _grade(self, step: int, row: Mapping, base: Mapping, ceilings: Mapping[str, float]) -> Grade:
        weights = (self.params.train.grading.identity_weight, self.params.train.grading.text_weight)
        concepts = []
        for name, (identity, text) in row.items():
            both = shares(identity, text, base[name], ceilings[name])
            concepts.append((identity, text, *both, harmonic_mean(both, weights)))
        return Grade(step, *(sum(column) / len(column) for column in zip(*concepts, strict=True)))

    @property
    def best(self) -> Grade | None:
        """The grade that `latest_good` chooses; None before the first."""
        return latest_good(self.grades(), self.params.train.grading.tolerance)

    @property
    def is_over(self) -> bool:
        """Whether `train.patience` checkpoints in a row have scored no higher than the highest before them."""
        scores, patience = [grade.score for grade in self.grades()], self.params.train.patience
        return bool(patience and scores and len(scores) - 1 - scores.index(max(scores)) >= patience)

    @property
    def selected_step(self) -> int | None:
        """Step of the checkpoint that becomes the adapter; None: the last step."""
        return self.best.step if self.params.train.select == "best" and self.best else None

    def summary(self) -> dict[str, Any]:
        """The grades and the selected step as they are in metrics.json; empty without grades."""
        if not self.best:
            return {}
        grades = [grade.to_dict() for grade in self.grades()]
        selected = self.best if self.selected_step else self.grades()[-1]
        return {"selected_step": selected.step, "selected_score": round(selected.score, 6), "grades": grades}
