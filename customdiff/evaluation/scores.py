"""Scores of generated images: per prompt, and summarized with intervals."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept
from customdiff.errors import UserError
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import (
    DIGITS,
    IntervalMetric,
    PairedMetric,
    PhotoShare,
    diversity,
    follows_prompt,
    leave_one_out_alignment,
    mean_over_groups,
    paired_metric,
    photo_share,
    text_alignment,
)
from customdiff.evaluation.prompts import JOIN, Prompt

# In the order of tables. An evaluation has those that its judges give; diversity with two images per prompt or more.
METRICS = ("text_alignment", "image_alignment", "masked_image_alignment", "identity", "diversity")
HOLDOUT = "holdout_alignment"


@dataclass(frozen=True)
class PromptScore:
    """The metrics of one prompt, means over its images.

    Attributes:
        base, adapter: by metric: some of `METRICS`, and `HOLDOUT` where there are holdout photos.
        followed: share of the images of base and adapter that no other prompt fits better; see `follows_prompt`.
        seeds: of base and adapter, by metric the means over the images of each noise seed; empty with a single seed.
        each: of base and adapter, by concept its own alignments, where the prompt is about several.
    """

    prompt: Prompt
    base: dict[str, float]
    adapter: dict[str, float]
    followed: tuple[float, float] = (1.0, 1.0)
    seeds: tuple[dict[str, list[float]], dict[str, list[float]]] = ({}, {})
    each: tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]] = ({}, {})

    def delta(self, metric: str) -> float:
        """Adapter minus base."""
        return self.adapter[metric] - self.base[metric]

    def by_seed(self, metric: str) -> np.ndarray:
        """A metric of base and adapter by noise seed, (2, S)."""
        means = (self.base, self.adapter)
        return np.array([seeds.get(metric) or [mean[metric]] for seeds, mean in zip(self.seeds, means, strict=True)])


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
        ceilings: alignments of the photos with one another by concept; see `photo_ceilings`.
        holdout: metrics of the holdout photos by concept; see `holdout.figures`.
        figures: `drift`, `class_drift` and `prior_kid`, by concept, None being all; see `drift.figures`.
        unmasked: share of the images that were not cut out for the masked image alignment.
        each: by label of several concepts, concept and metric: the alignments to that concept alone.
    """

    overall: dict[str, PairedMetric]
    concepts: dict[str, dict[str, PairedMetric]]
    num_prompts: int
    num_images: int
    prompt_accuracy: dict[str, PromptAccuracy] = field(default_factory=dict)
    ceilings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    holdout: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    figures: Mapping[str | None, Mapping[str, IntervalMetric]] = field(default_factory=dict)
    unmasked: float | None = None
    each: Mapping[str, Mapping[str, Mapping[str, PairedMetric]]] = field(default_factory=dict)

    def photo_share(self, concept: str | None = None) -> PhotoShare | None:
        """The share of the way to the photos, of one concept or of the means over concepts; None if it is unknown.

        The ceiling is of holdout photos where every concept has them, else of the instance images; the metric is
        identity, or image alignment where there is none or it does not tell the base model's images from photos.
        """
        single = [label for label in self.concepts if JOIN not in label] if concept is None else [concept]
        metrics = self.overall if concept is None else self.concepts[concept]
        for name, ceilings in (("holdout_share", self.holdout), ("photo_share", self.ceilings)):
            for metric in ("identity", "image_alignment"):
                found = [ceilings[label][metric] for label in single if metric in ceilings.get(label, {})]
                if not single or len(found) < len(single) or metric not in metrics:
                    continue
                if share := photo_share(metrics[metric], float(np.mean(found)), name=name, metric_name=metric):
                    return share
        return None

    def to_json(self) -> str:
        """The text of metrics.json."""
        concepts = {
            label: {name: metric.to_dict() for name, metric in metrics.items()} | self._extras(label)
            for label, metrics in self.concepts.items()
        }
        counts: dict[str, float] = {"num_prompts": self.num_prompts, "num_images": self.num_images}
        if self.unmasked is not None:
            counts["unmasked"] = self.unmasked
        overall = {name: metric.to_dict() for name, metric in self.overall.items()} | self._extras(None)
        return json.dumps(overall | {"concepts": concepts} | counts, indent=2, allow_nan=False) + "\n"

    def to_short_json(self) -> str:
        """The text of summary.json: what `dvc exp show` compares, three digits, without intervals."""
        values: dict[str, float] = {}
        for name in [name for name in ("image_alignment", "identity", "text_alignment") if name in self.overall]:
            metric = self.overall[name]
            values[name] = round(metric.adapter, 3)
            values[f"{name.partition('_')[0]}_delta"] = round(metric.delta, 3)
        if share := self.photo_share():
            values[share.name] = round(share.value, 3)
        values |= {name: round(figure.value, 3) for name, figure in self.figures.get(None, {}).items()}
        return json.dumps(values, indent=2, allow_nan=False) + "\n"

    def _extras(self, concept: str | None) -> dict[str, dict[str, Any]]:
        """What is not a paired metric, of a concept or overall, where it is known."""
        share = self.photo_share(concept)
        extras: dict[str, dict[str, Any]] = {share.name: share.to_dict()} if share else {}
        extras |= {name: asdict(figure) for name, figure in self.figures.get(concept, {}).items()}
        if concept in self.prompt_accuracy:
            extras["prompt_accuracy"] = asdict(self.prompt_accuracy[concept])
        if concept is not None and concept in self.each:
            extras["each"] = {
                name: {metric: found.to_dict() for metric, found in own.items()}
                for name, own in self.each[concept].items()
            }
        if concept is not None and concept in self.holdout:
            extras["holdout"] = {name: round(value, DIGITS) for name, value in self.holdout[concept].items()}
        return extras


def photo_ceilings(instances: Mapping[str, Sequence[Image.Image]], judges: Judges) -> dict[str, dict[str, float]]:
    """Alignments of each concept's photos with one another, by metric; concepts with a single photo are left out."""
    return {
        name: {
            metric: float(leave_one_out_alignment(judges.embed(metric, images, name)) or 0)
            for metric in judges.alignments
        }
        for name, images in instances.items()
        if len(images) > 1
    }


def metrics_of(scores: Sequence[PromptScore]) -> tuple[str, ...]:
    """Those of `METRICS` that the scores have."""
    return tuple(name for name in METRICS if all(name in score.base for score in scores))


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
    judges: Judges,
    holdout: Mapping[str, Sequence[Image.Image]] | None = None,
) -> list[PromptScore]:
    """Score each prompt: the mean metrics over its images, of the base model and of the adapter.

    Args:
        instances: instance images by concept.
        judges: embed texts and images.
        holdout: photos by concept that were not trained on; None: no `HOLDOUT` metric.

    Returns:
        One score per prompt. An alignment of an image of several concepts is the mean of those to each concept
        (section 4.2 of the paper); see `Judges.align`.
    """
    texts = judges.clip.text([pair.text for pair in pairs])
    kept_out = _embed(holdout or {}, "image_alignment", judges)
    references = {metric: _embed(instances, metric, judges) for metric in judges.alignments}
    places: dict[Prompt, list[int]] = {}
    seeds: dict[Prompt, dict[int, list[int]]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.prompt, []).append(place)
        seeds.setdefault(pair.prompt, {}).setdefault(pair.repeat, []).append(place)
    sets = [chosen for each in seeds.values() for chosen in each.values()]
    found, followed, to_each = [], [], []
    for images in ([pair.base for pair in pairs], [pair.customized for pair in pairs]):
        embedded = judges.clip.images(images)
        values = {"text_alignment": text_alignment(embedded, texts)}
        aligned = {metric: _alignments(metric, images, pairs, photos, judges) for metric, photos in references.items()}
        if kept_out:
            aligned[HOLDOUT] = _alignments("image_alignment", images, pairs, kept_out, judges)
        values |= {metric: np.nanmean(list(each.values()), axis=0) for metric, each in aligned.items()}
        if all(len(chosen) > 1 for chosen in sets):
            values["diversity"] = _diversity(judges.features(images), sets)
        found.append(values)
        to_each.append(aligned)
        followed.append(_followed(embedded, texts, places))

    base, adapter = found
    return [
        PromptScore(
            prompt,
            _means(base, chosen),
            _means(adapter, chosen),
            (float(followed[0][chosen].mean()), float(followed[1][chosen].mean())),
            (_seed_means(base, seeds[prompt]), _seed_means(adapter, seeds[prompt])),
            (_means_to_each(to_each[0], prompt, chosen), _means_to_each(to_each[1], prompt, chosen)),
        )
        for prompt, chosen in places.items()
    ]


def _means(values: Mapping[str, np.ndarray], chosen: Sequence[int]) -> dict[str, float]:
    return {name: float(each[chosen].mean()) for name, each in values.items()}


def _means_to_each(
    aligned: Mapping[str, Mapping[str, np.ndarray]], prompt: Prompt, chosen: Sequence[int]
) -> dict[str, dict[str, float]]:
    """By concept its own alignments, of a prompt about several; empty for one about a single concept."""
    if len(prompt.concepts) == 1:
        return {}
    return {name: _means({metric: each[name] for metric, each in aligned.items()}, chosen) for name in prompt.concepts}


def _seed_means(values: Mapping[str, np.ndarray], seeds: Mapping[int, Sequence[int]]) -> dict[str, list[float]]:
    """By metric the mean over the images of each noise seed; empty for a single seed."""
    if len(seeds) == 1:
        return {}
    return {name: [float(each[chosen].mean()) for chosen in seeds.values()] for name, each in values.items()}


def _followed(images: np.ndarray, texts: np.ndarray, places: Mapping[Prompt, Sequence[int]]) -> np.ndarray:
    """`follows_prompt` of each image, (N,); the images of a prompt are at its `places`."""
    result = np.zeros(len(images))
    for label in {prompt.concept_label for prompt in places}:
        groups = [chosen for prompt, chosen in places.items() if prompt.concept_label == label]
        own = [number for number, chosen in enumerate(groups) for _ in chosen]
        rows = [place for chosen in groups for place in chosen]
        result[rows] = follows_prompt(images[rows], texts[[chosen[0] for chosen in groups]], own)
    return result


def _embed(photos: Mapping[str, Sequence[Image.Image]], metric: str, judges: Judges) -> dict[str, np.ndarray]:
    return {name: judges.embed(metric, images, name) for name, images in photos.items()}


def _alignments(
    metric: str,
    images: Sequence[Image.Image],
    pairs: Sequence[ImagePair],
    photos: Mapping[str, np.ndarray],
    judges: Judges,
) -> dict[str, np.ndarray]:
    """An alignment of each image to each concept, (N,), nan where its prompt is about others; `photos`: features."""
    found = {}
    for name, features in photos.items():
        found[name] = np.full(len(pairs), np.nan)
        shown = [row for row, pair in enumerate(pairs) if name in pair.prompt.concepts]
        for apart in (False, True):
            rows = [row for row in shown if (len(pairs[row].prompt.concepts) > 1) == apart]
            found[name][rows] = judges.align(metric, [images[row] for row in rows], name, features, apart=apart)
    return found


def _diversity(features: np.ndarray, sets: Sequence[Sequence[int]]) -> np.ndarray:
    """The `diversity` of each image's set, (N,): the images of one prompt and noise seed, at these places."""
    result = np.zeros(len(features))
    for chosen in sets:
        result[list(chosen)] = diversity(features[list(chosen)])
    return result


def by_concept(scores: Iterable[PromptScore]) -> dict[str, list[PromptScore]]:
    """Scores by the label of their prompt's concepts."""
    groups: dict[str, list[PromptScore]] = {}
    for score in scores:
        groups.setdefault(score.prompt.concept_label, []).append(score)
    return groups


def single_concepts(scores: Iterable[PromptScore]) -> list[list[PromptScore]]:
    """One group of scores per concept, without prompts that show several concepts in one image."""
    return list(by_concept(score for score in scores if len(score.prompt.concepts) == 1).values())


def summarize(scores: Sequence[PromptScore], num_images: int, *, resamples: int, seed: int, **further: Any) -> Summary:
    """Metrics over all concepts and of each, with 95 % intervals of the paired differences (`bootstrap_interval`).

    Args:
        num_images: that each model generated.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        further: attributes of the summary that are not computed from the scores, such as `ceilings`.
    """
    names = metrics_of(scores)

    def summarized(groups: Sequence[Sequence[PromptScore]]) -> dict[str, PairedMetric]:
        return {
            metric: paired_metric(
                *([np.array([score.by_seed(metric)[i] for score in group]) for group in groups] for i in (0, 1)),
                resamples=resamples,
                seed=seed,
            )
            for metric in names
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
    each = {label: _each_concept(group, resamples, seed) for label, group in groups.items() if JOIN in label}
    overall = summarized(single_concepts(scores))
    return Summary(overall, concepts, len(scores), num_images, accuracy, each=each, **further)


def _each_concept(group: Sequence[PromptScore], resamples: int, seed: int) -> dict[str, dict[str, PairedMetric]]:
    """By concept its own alignments in prompts about several, over all of these prompts."""
    return {
        name: {
            metric: paired_metric(
                *([np.array([[score.each[i][name][metric]] for score in group])] for i in (0, 1)),
                resamples=resamples,
                seed=seed,
            )
            for metric in metrics
        }
        for name, metrics in group[0].each[0].items()
    }


def write_table(scores: Sequence[PromptScore], path: Path) -> None:
    """Write the scores as CSV, six digits, for `dvc plots` and spreadsheets: a row per prompt.

    Columns: concept, prompt, kind, and of each metric base_<metric>, <metric> and <metric>_delta.
    """
    names = metrics_of(scores)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(
            ["concept", "prompt", "kind", *(each for name in names for each in (f"base_{name}", name, f"{name}_delta"))]
        )
        for score in scores:
            values = [value for name in names for value in (score.base[name], score.adapter[name], score.delta(name))]
            prompt = score.prompt
            table.writerow([prompt.concept_label, prompt.template, prompt.kind, *(f"{value:.6f}" for value in values)])
