"""Scores of generated images: per prompt, and summarized with intervals."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept
from customdiff.errors import UserError
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.metrics import PairedMetric, image_alignment, paired_metric, text_alignment
from customdiff.evaluation.prompts import Prompt
from customdiff.models.clip import Clip

METRICS = ("text_alignment", "image_alignment")
HOLDOUT = "holdout_alignment"


@dataclass(frozen=True)
class PromptScore:
    """The metrics of one prompt, means over its images.

    Attributes:
        base, adapter: by metric: `METRICS`, and `HOLDOUT` where there are holdout photos.
    """

    prompt: Prompt
    base: dict[str, float]
    adapter: dict[str, float]

    def delta(self, metric: str) -> float:
        """Adapter minus base."""
        return self.adapter[metric] - self.base[metric]


@dataclass(frozen=True)
class Summary:
    """The metrics of an adapter beside the base model's.

    Attributes:
        overall: by metric, over all concepts. Prompts that show several concepts in one image do not count here.
        concepts: by concept label (`cat`, `cat+teapot`) and metric.
        num_prompts, num_images: how many of them each model was given.
    """

    overall: dict[str, PairedMetric]
    concepts: dict[str, dict[str, PairedMetric]]
    num_prompts: int
    num_images: int

    def to_json(self) -> str:
        """The text of metrics.json."""
        concepts = {
            label: {name: metric.to_dict() for name, metric in metrics.items()}
            for label, metrics in self.concepts.items()
        }
        counts = {"num_prompts": self.num_prompts, "num_images": self.num_images}
        overall = {name: metric.to_dict() for name, metric in self.overall.items()}
        return json.dumps(overall | {"concepts": concepts} | counts, indent=2, allow_nan=False) + "\n"

    def to_short_json(self) -> str:
        """The text of summary.json: what `dvc exp show` compares, three digits, without intervals."""
        values = {}
        for name in ("image_alignment", "text_alignment"):
            metric = self.overall[name]
            values[name] = round(metric.adapter, 3)
            values[f"{name.partition('_')[0]}_delta"] = round(metric.delta, 3)
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


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
    found = []
    for images in ([pair.base for pair in pairs], [pair.customized for pair in pairs]):
        embedded = judge.images(images)
        values = {"text_alignment": text_alignment(embedded, texts)}
        for metric, photos in references.items():
            alignments = [_alignment(row, pair, photos) for row, pair in zip(embedded, pairs, strict=True)]
            values[metric] = np.array(alignments)
        found.append(values)
    places: dict[Prompt, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.prompt, []).append(place)
    return [
        PromptScore(prompt, *({name: float(each[chosen].mean()) for name, each in values.items()} for values in found))
        for prompt, chosen in places.items()
    ]


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


def summarize(scores: Sequence[PromptScore], num_images: int, *, resamples: int, seed: int) -> Summary:
    """Metrics over all concepts and of each, with 95 % bootstrap intervals of the paired differences over prompts.

    Args:
        num_images: that each model generated.
        resamples: of the bootstrap.
        seed: of the bootstrap.
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

    concepts = {label: summarized([group]) for label, group in by_concept(scores).items()}
    return Summary(summarized(single_concepts(scores)), concepts, len(scores), num_images)


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
