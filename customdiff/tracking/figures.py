"""What runs are compared by: parameters, figures of the evaluation, and the score that makes an adapter champion."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from customdiff.config import Params
from customdiff.config.section import Section
from customdiff.redaction import redact

# MLflow's pages sort groups of charts by name; this one comes before those of curves and images.
EVALUATION = "evaluation/"
ALWAYS = ("base.model", "base.seed", "train.method", "train.max_steps", "train.batch_size", "train.learning_rate")
# These change neither the weights nor the figures.
NEVER = ("tracking.", "base.device", "train.validation.", "train.checkpoint", "train.launch.", "evaluate.batch_size")


def run_params(params: Params) -> dict[str, str]:
    """Parameters that tell runs apart, by dotted key: those that differ from their default, and a few always.

    MLflow's pages show all parameters of a run above each of its images, so a hundred defaults would hide them.
    params.yaml is an artifact of the run.
    """
    every = flatten(params.model_dump())
    wanted = {**flatten(_changed(params)), **{key: every[key] for key in ALWAYS}}
    return {
        key: value
        for key, value in every.items()
        if key in wanted and not key.startswith(NEVER) and ".source." not in key  # the data sets have it
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted keys, without secrets: {"train": {"max_steps": 250}} -> {"train.max_steps": "250"}."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = redact(value if isinstance(value, str) else json.dumps(value))
    return flat


def evaluation_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of metrics.json that runs are compared by, under flat names.

    Intervals are left out: as single values they would each get a chart of their own.

    Returns:
        For each metric `text_alignment` and `text_alignment_delta`, with `EVALUATION` before them; with several
        concepts also those of each, with `.<concept>` at the end. Prompts with several of them, `cat+teapot`, end in
        `.cat and teapot`, because MLflow allows no plus sign, and those of each in them in `.cat in cat and teapot`.
    """
    groups = {"": metrics}
    for label, own in metrics["concepts"].items() if len(metrics["concepts"]) > 1 else ():
        words = label.replace("+", " and ")
        groups |= {f".{words}": own} | {f".{name} in {words}": each for name, each in own.get("each", {}).items()}
    flat: dict[str, float] = {}
    for suffix, group in groups.items():
        for name, values in group.items():
            if isinstance(values, Mapping) and "delta" in values:
                flat |= {f"{name}{suffix}": values["adapter"], f"{name}_delta{suffix}": values["delta"]}
    return {EVALUATION + name: value for name, value in flat.items()}


def score(kind: Literal["harmonic_mean", "image_alignment", "text_alignment"], metrics: Mapping[str, Any]) -> float:
    """One number for an adapter; higher is better.

    Args:
        kind: `tracking.score`; the harmonic mean is that of text and image alignment, 0 if one of them is not positive.
        metrics: contents of metrics.json.
    """
    if kind != "harmonic_mean":
        return metrics[kind]["adapter"]
    text, image = (metrics[name]["adapter"] for name in ("text_alignment", "image_alignment"))
    return 2 * text * image / (text + image) if min(text, image) > 0 else 0.0


def _changed(section: Section) -> dict[str, Any]:
    """The values of a section that differ from their defaults."""
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            changed[name] = _changed(value)
        elif name == "concepts":
            changed[name] = {concept: _changed(each) for concept, each in value.items()}
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            changed[name] = value
    return {name: value for name, value in changed.items() if value != {}}
