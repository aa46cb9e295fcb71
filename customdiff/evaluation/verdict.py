"""How far a training came from the base model to the photos, in words, and the next step that its figures suggest.

A change of a metric alone does not say whether a subject is learned: "image alignment rises by 0.05" may be a tenth of
the way to the photos. The thresholds are measured on the embedded base model and its judge (docs/evaluation.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from customdiff.config import Params
from customdiff.evaluation.metrics import PhotoShare
from customdiff.evaluation.prompts import JOIN
from customdiff.evaluation.scores import PromptAccuracy, Summary

# Share of the way from which a subject is partly learned, and learned. Those of identity are lower because its share is
# lower in the same runs; both are measured on the embedded model alone (docs/evaluation.md).
LEVELS = {"image_alignment": (0.25, 0.6), "identity": (0.2, 0.5)}
FOLLOWS = 0.8  # of the base model's prompt accuracy; below it the adapter ignores prompts


@dataclass(frozen=True)
class Verdict:
    """What a training did to one concept.

    Attributes:
        concept: its name.
        share: of the way to the photos; None if it is unknown.
        level: `hardly learned`, `partly learned`, `learned`, or `unknown`.
        accuracy: of prompts.
        next_step: what the figures suggest, with the keys of params.yaml; empty if they suggest nothing.
    """

    concept: str
    share: PhotoShare | None
    level: str
    accuracy: PromptAccuracy
    next_step: str

    @property
    def ignores_prompts(self) -> bool:
        """Whether far fewer images fit their prompt than with the base model."""
        return self.accuracy.adapter < FOLLOWS * self.accuracy.base

    @property
    def result(self) -> str:
        """One sentence: share, interval, level, and whether prompts are followed."""
        if self.share is None:
            return f"{self.concept}: how far it came to your photos is unknown."
        value, low, high = (f"{100 * each:.0f}" for each in (self.share.value, self.share.low, self.share.high))
        photos = "holdout photos" if self.share.name == "holdout_share" else "photos"
        text = f"{self.concept}: {value} % of the way to your {photos} ({low} to {high} %): {self.level}"
        if self.ignores_prompts:
            text += (
                f", but only {100 * self.accuracy.adapter:.0f} % of the images fit their own prompt better than the "
                f"others (base model: {100 * self.accuracy.base:.0f} %)"
            )
        return f"{text}."


def verdicts(summary: Summary, params: Params, captioned: Mapping[str, Sequence[bool]]) -> list[Verdict]:
    """The verdict on each concept, in the order of params.yaml.

    Args:
        summary: of the evaluation.
        params: those that the adapter was trained with.
        captioned: by concept, whether each photo has a caption file (.txt).
    """
    return [_verdict(name, summary, params, captioned[name]) for name in summary.concepts if JOIN not in name]


def _verdict(name: str, summary: Summary, params: Params, captioned: Sequence[bool]) -> Verdict:
    share = summary.photo_share(name)
    accuracy = summary.prompt_accuracy.get(name, PromptAccuracy(1, 1))
    step = _without_share(name, len(captioned))
    if share is None:
        return Verdict(name, None, "unknown", accuracy, step)
    partly, learned = LEVELS[share.metric]
    level = "hardly learned" if share.value < partly else "partly learned" if share.value < learned else "learned"
    ignores = Verdict(name, share, level, accuracy, "").ignores_prompts
    return Verdict(name, share, level, accuracy, _next_step(name, level, ignores, params, captioned))


def _without_share(name: str, photos: int) -> str:
    """The next step where there is no share of the way."""
    if photos < 2:
        return f"add photos to concepts.{name}.source (4 to 5): a single photo has no other to be compared with."
    return (
        "use another CLIP as evaluate.clip, or a vision model as evaluate.identity: to this one the base model's "
        "images are nearly as similar to your photos as the photos are to each other."
    )


def _next_step(name: str, level: str, ignores_prompts: bool, params: Params, captioned: Sequence[bool]) -> str:
    """What the figures and parameters suggest; the first cause that applies."""
    train = params.train
    if ignores_prompts:
        prior = f"a higher train.prior_loss_weight (now {train.prior_loss_weight:g})"
        if not train.preserves_prior:
            prior = "train.with_prior_preservation: true"
        rate = f"a lower train.learning_rate (now {train.learning_rate:g})"
        if level == "hardly learned":
            return f"try {rate}: prompts are followed less, and the subject is not learned."
        return (
            f"try fewer steps (train.max_steps is {train.max_steps}; customdiff sweep compares the checkpoints), "
            f"{rate}, or {prior}."
        )
    if level == "learned":
        return ""
    if cause := _vary_captions(params, captioned):
        return cause
    has_masks = params.prepare.masks != "none" and not all(captioned)
    sheet = f", and check the masks in data/prepared/{name}/sheet.jpg" if has_masks else ""
    return f"try more steps (train.max_steps is {train.max_steps}){sheet}."


def _vary_captions(params: Params, captioned: Sequence[bool]) -> str:
    """How to make captions name the background; empty if they do.

    A caption that is the same for all photos hardly teaches the subject (docs/what-makes-it-learn.md).
    """
    prepare = params.prepare
    template = prepare.captions == "template" or (
        prepare.captions == "auto" and prepare.captioner is None and not all(captioned)
    )
    if not template:
        return ""
    if prepare.captions == "template" and all(captioned) and captioned:
        return "set prepare.captions: auto: your photos have captions (.txt), which captions: template ignores."
    if prepare.masks == "none":
        return (
            "set prepare.masks: auto, or write captions that name the background (a .txt file beside each photo): "
            "the captions of your photos are all the same."
        )
    if prepare.backgrounds.share == 0:
        return "raise prepare.backgrounds.share (default: 0.75): at 0, all captions of your photos are the same."
    return ""


def lines(found: Sequence[Verdict]) -> list[str]:
    """The verdicts for the terminal: one or two lines per concept."""
    return [line for each in found for line in (each.result, f"  next: {each.next_step}") if line != "  next: "]


def tracked(summary: Summary, found: Sequence[Verdict]) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags for MLflow: figures without a base, with several concepts also of each; verdicts as text."""
    metrics: dict[str, float] = {}
    for concept in [None, *(each.concept for each in found if len(found) > 1)]:
        suffix, share = f".{concept}" if concept else "", summary.photo_share(concept)
        values = {name: figure.value for name, figure in summary.figures.get(concept, {}).items()}
        values |= {share.name: share.value} if share else {}
        metrics |= {f"{name}{suffix}": value for name, value in values.items()}
    return metrics, {"customdiff.verdict": " ".join(each.result for each in found)}
