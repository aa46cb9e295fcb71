"""Scores of generated images: per prompt, and summarized with intervals."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept
from customdiff.errors import UserError
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.metrics import (
    DIGITS,
    PairedMetric,
    PhotoShare,
    follows_prompt,
    image_alignment,
    leave_one_out_alignment,
    mean_over_groups,
    paired_metric,
    photo_share,
    text_alignment,
)
from customdiff.evaluation.prompts import JOIN, Prompt
from customdiff.models.clip import Clip

METRICS = ("text_alignment", "image_alignment")
HOLDOUT = "holdout_alignment"


@dataclass(frozen=True)
class PromptScore:
    """The metrics of one prompt, means over its images.

    Attributes:
        base, adapter: by metric: `METRICS`, and `HOLDOUT` where there are holdout photos.
        followed: share of the images of base and adapter that no other prompt fits better; see `follows_prompt`.
    """

    prompt: Prompt
    base: dict[str, float]
    adapter: dict[str, float]
    followed: tuple[float, float] = (1.0, 1.0)

    def delta(self, metric: str) -> float:
        """Adapter minus base."""
        return self.adapter[metric] - self.base[metric]


@dataclass(frozen=True)
class PromptAccuracy:
    """Share of images that no other prompt of their concept fits better, of base model and adapter, 0 to 1."""

    base: float
    adapter: float


@dataclass(frozen=True)
class Summary:
    """The metrics of an adapter beside the base model's.

    Attributes:
        overall: by metric, over all concepts. Prompts that show several concepts in one image do not count here.
        concepts: by concept label (`cat`, `cat+teapot`) and metric.
        num_prompts, num_images: how many of them each model was given.
        prompt_accuracy: by concept, without labels of several concepts.
        ceilings: image alignment of the photos by concept; see `photo_ceilings`.
    """

    overall: dict[str, PairedMetric]
    concepts: dict[str, dict[str, PairedMetric]]
    num_prompts: int
    num_images: int
    prompt_accuracy: dict[str, PromptAccuracy] = field(default_factory=dict)
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def photo_share(self, concept: str | None = None) -> PhotoShare | None:
        """The share of the way to the photos, of one concept or of the means over concepts; None if it is unknown."""
        single = [label for label in self.concepts if JOIN not in label] if concept is None else [concept]
        ceilings = [self.ceilings[label] for label in single if label in self.ceilings]
        if not single or len(ceilings) < len(single):
            return None
        metrics = self.overall if concept is None else self.concepts[concept]
        return photo_share(metrics["image_alignment"], float(np.mean(ceilings)))

    def to_json(self) -> str:
        """The text of metrics.json."""
        concepts = {
            label: {name: metric.to_dict() for name, metric in metrics.items()} | self._extras(label)
            for label, metrics in self.concepts.items()
        }
        counts = {"num_prompts": self.num_prompts, "num_images": self.num_images}
        overall = {name: metric.to_dict() for name, metric in self.overall.items()} | self._extras(None)
        return json.dumps(overall | {"concepts": concepts} | counts, indent=2, allow_nan=False) + "\n"

    def to_short_json(self) -> str:
        """The text of summary.json: what `dvc exp show` compares, three digits, without intervals."""
        values = {}
        for name in ("image_alignment", "text_alignment"):
            metric = self.overall[name]
            values[name] = round(metric.adapter, 3)
            values[f"{name.partition('_')[0]}_delta"] = round(metric.delta, 3)
        if share := self.photo_share():
            values["photo_share"] = round(share.value, 3)
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def _extras(self, concept: str | None) -> dict[str, dict[str, float]]:
        """`photo_share` and `prompt_accuracy` of a concept or overall, where they are known."""
        share = self.photo_share(concept)
        extras = {"photo_share": asdict(share)} if share else {}
        if concept in self.prompt_accuracy:
            extras["prompt_accuracy"] = asdict(self.prompt_accuracy[concept])
        return extras


def photo_ceilings(instances: Mapping[str, Sequence[Image.Image]], judge: Clip) -> dict[str, float]:
    """Image alignment of each concept's photos with one another; concepts with a single photo are left out."""
    found = {name: leave_one_out_alignment(judge.images(images)) for name, images in instances.items()}
    return {name: ceiling for name, ceiling in found.items() if ceiling is not None}


def check_concepts(adapter_config: AdapterConfig, concepts: Mapping[str, Concept]) -> None:
    """Refuse an adapter that has not learned the concepts of params.yaml under their tokens.

    The tokenizer would split an unknown token silently, and the metrics would be of another prompt.

    Raises:
        UserError: a concept is missing, or has another token.
    """
    learned = {name: concept.modifier_token for name, concept in adapter_config.concepts.items()}
    for name, concept in concepts.items():
        if learned.get(name) != concept.modifier_token:
            raise UserError(
                f"concepts.{name}: the adapter has not learned it as {concept.modifier_token}; `dvc repro` trains it"
            )


def score_prompts(
    pairs: Sequence[ImagePair],
    instances: Mapping[str, Sequence[Image.Image]],
    judge: Clip,
    holdout: Mapping[str, Sequence[Image.Image]] | None = None,
) -> list[PromptScore]:
    """Score each prompt: the mean metrics over its images, of the base model and of the adapter.

    Args:
        instances: instance images by concept.
        judge: embeds texts and images.
        holdout: photos by concept that were not trained on; None: no `HOLDOUT` metric.

    Returns:
        One score per prompt. The image alignment of an image of several concepts is the mean of those to each concept
        (section 4.2 of the paper).
    """
    texts = judge.text([pair.text for pair in pairs])
    references = {"image_alignment": _embed(instances, judge)}
    if holdout:
        references[HOLDOUT] = _embed(holdout, judge)
    places: dict[Prompt, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.prompt, []).append(place)
    found, followed = [], []
    for images in ([pair.base for pair in pairs], [pair.customized for pair in pairs]):
        embedded = judge.images(images)
        values = {"text_alignment": text_alignment(embedded, texts)}
        for metric, photos in references.items():
            alignments = [_alignment(row, pair, photos) for row, pair in zip(embedded, pairs, strict=True)]
            values[metric] = np.array(alignments)
        found.append(values)
        followed.append(_followed(embedded, texts, places))

    def means(values: Mapping[str, np.ndarray], chosen: Sequence[int]) -> dict[str, float]:
        return {name: float(each[chosen].mean()) for name, each in values.items()}

    base, adapter = found
    return [
        PromptScore(
            prompt,
            means(base, chosen),
            means(adapter, chosen),
            (float(followed[0][chosen].mean()), float(followed[1][chosen].mean())),
        )
        for prompt, chosen in places.items()
    ]


def _followed(images: np.ndarray, texts: np.ndarray, places: Mapping[Prompt, Sequence[int]]) -> np.ndarray:
    """`follows_prompt` of each image, (N,); the images of a prompt are at its `places`."""
    result = np.zeros(len(images))
    for label in {prompt.concept_label for prompt in places}:
        groups = [chosen for prompt, chosen in places.items() if prompt.concept_label == label]
        own = [number for number, chosen in enumerate(groups) for _ in chosen]
        rows = [place for chosen in groups for place in chosen]
        result[rows] = follows_prompt(images[rows], texts[[chosen[0] for chosen in groups]], own)
    return result


def _embed(photos: Mapping[str, Sequence[Image.Image]], judge: Clip) -> dict[str, np.ndarray]:
    return {name: judge.images(images) for name, images in photos.items()}


def _alignment(embedding: np.ndarray, pair: ImagePair, references: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([image_alignment(embedding[None], references[name])[0] for name in pair.prompt.concepts]))


def by_concept(scores: Iterable[PromptScore]) -> dict[str, list[PromptScore]]:
    """Scores by the label of their prompt's concepts."""
    groups: dict[str, list[PromptScore]] = {}
    for score in scores:
        groups.setdefault(score.prompt.concept_label, []).append(score)
    return groups


def single_concepts(scores: Iterable[PromptScore]) -> list[list[PromptScore]]:
    """One group of scores per concept, without prompts that show several concepts in one image."""
    return list(by_concept(score for score in scores if len(score.prompt.concepts) == 1).values())


def summarize(
    scores: Sequence[PromptScore],
    num_images: int,
    *,
    resamples: int,
    seed: int,
    ceilings: Mapping[str, float] | None = None,
) -> Summary:
    """Metrics over all concepts and of each, with 95 % bootstrap intervals of the paired differences over prompts.

    Args:
        num_images: that each model generated.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        ceilings: image alignment of the photos; see `photo_ceilings`.
    """

    def summarized(groups: Sequence[Sequence[PromptScore]]) -> dict[str, PairedMetric]:
        return {
            metric: paired_metric(
                [np.array([score.base[metric] for score in group]) for group in groups],
                [np.array([score.adapter[metric] for score in group]) for group in groups],
                resamples=resamples,
                seed=seed,
            )
            for metric in METRICS
        }

    groups = by_concept(scores)
    concepts = {label: summarized([group]) for label, group in groups.items()}
    accuracy = {
        label: PromptAccuracy(
            *(round(mean_over_groups([np.array([s.followed[i] for s in groups[label]])]), DIGITS) for i in (0, 1))
        )
        for label in groups
        if JOIN not in label
    }
    overall = summarized(single_concepts(scores))
    return Summary(overall, concepts, len(scores), num_images, accuracy, ceilings or {})


COLUMNS = (
    "concept",
    "prompt",
    "kind",
    *(f"{before}{metric}{after}" for metric in METRICS for before, after in (("base_", ""), ("", ""), ("", "_delta"))),
)


def write_table(scores: Iterable[PromptScore], path: Path) -> None:
    """Write the scores as CSV with the columns `COLUMNS`, six digits, for `dvc plots` and spreadsheets."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for score in scores:
            values = [
                value
                for metric in METRICS
                for value in (score.base[metric], score.adapter[metric], score.delta(metric))
            ]
            prompt = score.prompt
            table.writerow([prompt.concept_label, prompt.template, prompt.kind, *(f"{value:.6f}" for value in values)])
