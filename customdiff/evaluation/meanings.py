"""What each figure means and which way is better, in words, and the table of the report."""

from dataclasses import dataclass

from customdiff.evaluation.metrics import IntervalMetric, KidMetric, PairedMetric
from customdiff.evaluation.scores import Summary

QUESTIONS = ("Is the subject right?", "Is the prompt followed?", "Is the rest of the model untouched?")
SUBJECT, PROMPT, REST = QUESTIONS

# figure -> the question that it answers, what it is, and which way is better
MEANINGS = {
    "identity": (
        SUBJECT,
        "similarity to your photos by a vision model that tells individuals of a class apart",
        "higher",
    ),
    "masked_image_alignment": (
        SUBJECT,
        "similarity to your photos by CLIP, subjects cut out: a copied background earns nothing",
        "higher",
    ),
    "image_alignment": (
        SUBJECT,
        "similarity to your photos by CLIP, background included: it also rises if a photo is copied",
        "higher",
    ),
    "holdout_share": (SUBJECT, "way from the base model (0) to photos that were not trained on (1)", "nearer to 1"),
    "photo_share": (SUBJECT, "way from the base model (0) to your photos (1)", "nearer to 1"),
    "text_alignment": (
        PROMPT,
        "fit of image and prompt by CLIP; also falls for a subject that CLIP does not know, however well drawn",
        "higher",
    ),
    "diversity": (
        PROMPT,
        "difference between the images of one prompt; far below the base model, the adapter repeats one image",
        "near the base model's",
    ),
    "drift": (REST, "change of images of other things, which the adapter should leave as they are", "lower"),
    "class_drift": (REST, "change of images of the class without the token", "lower"),
    "prior_kid": (
        REST,
        "distance of images of the class, without the token, to the real class images",
        "not above the base model's",
    ),
}
PERCENT = ("holdout_share", "photo_share")


@dataclass(frozen=True)
class FigureRow:
    """A line of the report's table; what a figure does not have is empty."""

    question: str
    title: str
    meaning: str
    better: str
    base: str
    adapter: str
    interval: str
    holdout: str = ""


def table(summary: Summary, concept: str | None = None) -> list[FigureRow]:
    """The figures of a concept, or of the means over concepts, in the order of `QUESTIONS`."""
    paired = summary.overall if concept is None else summary.concepts[concept]
    share = summary.photo_share(concept)
    single: dict[str, IntervalMetric] = dict(summary.figures.get(concept, {})) | ({share.name: share} if share else {})
    name = next(iter(summary.holdout), None) if concept is None and len(summary.concepts) == 1 else concept
    holdout = summary.holdout.get(name or "", {})
    rows = []
    for figure in MEANINGS:
        if figure in paired:
            rows.append(_paired(figure, paired[figure], holdout.get(figure)))
        elif figure in single:
            rows.append(_single(figure, single[figure]))
    return rows


def title_of(figure: str) -> str:
    """The name of a figure in text: `image_alignment` is "Image alignment", `prior_kid` "Prior KID"."""
    return figure.replace("_", " ").capitalize().replace("kid", "KID")


def _paired(figure: str, metric: PairedMetric, holdout: float | None) -> FigureRow:
    interval = f"{metric.delta:+.3f} ({metric.delta_low:+.3f} to {metric.delta_high:+.3f})"
    values = (f"{metric.base:.3f}", f"{metric.adapter:.3f}", interval, "" if holdout is None else f"{holdout:.3f}")
    question, meaning, better = MEANINGS[figure]
    return FigureRow(question, title_of(figure), meaning, better, *values)


def _single(figure: str, metric: IntervalMetric) -> FigureRow:
    question, meaning, better = MEANINGS[figure]
    if figure in PERCENT:
        value, low, high = (f"{100 * each:.0f} %" for each in (metric.value, metric.low, metric.high))
    else:
        value, low, high = (f"{each:.3f}" for each in (metric.value, metric.low, metric.high))
    base = f"{metric.base:.3f}" if isinstance(metric, KidMetric) else ""
    return FigureRow(question, title_of(figure), meaning, better, base, value, f"({low} to {high})")
