"""Names and descriptions of runs."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from customdiff.config import Params

TITLES = {"image_alignment": "Image alignment (to the photos)", "text_alignment": "Text alignment (to the prompt)"}


def run_name(params: Params, *extra: str) -> str:
    """`cat · custom_diffusion · 250 steps`, after the name of a DVC experiment and before `extra`."""
    train = params.train
    parts = [os.environ.get("DVC_EXP_NAME", ""), "+".join(params.concepts), train.method, f"{train.max_steps} steps"]
    return " · ".join(filter(None, [*parts, *extra]))


def training_description(params: Params) -> str:
    """Markdown: what is being learned, and how."""
    train = params.train
    rows = [
        *(
            (f"concept {name}", f"`{each.modifier_token} {each.class_prompt}`")
            for name, each in params.concepts.items()
        ),
        ("base model", f"{params.base.model} {params.base.revision or ''}".strip()),
        ("training", f"{train.method}, {train.max_steps} steps, batch size {train.batch_size}"),
        ("learning rate", f"{train.learning_rate:g}"),
        ("captions, masks", f"{params.prepare.captions}, {params.prepare.masks}"),
        ("seed", str(params.base.seed)),
    ]
    return _table(("setting", "value"), rows)


def evaluation_description(
    params: Params, metrics: Mapping[str, Any], verdict: Sequence[str], pictures: Sequence[str], seconds: float
) -> str:
    """Markdown: verdict, figures beside the base model's, pictures, and the description of the training.

    Args:
        metrics: contents of metrics.json.
        verdict: sentences.
        pictures: Markdown of each; see `Tracker.picture`.
        seconds: that the evaluation took.
    """
    parts = [f"**{' '.join(verdict)}**"] if verdict else []
    groups = {"": metrics}
    if len(metrics["concepts"]) > 1:
        groups |= {f", {name}": figures for name, figures in metrics["concepts"].items()}
    rows = [
        (
            TITLES.get(name, name.replace("_", " ")) + suffix,
            f"{figure['base']:.3f}",
            f"**{figure['adapter']:.3f}**",
            f"{figure['delta']:+.3f} ({figure['delta_low']:+.3f} to {figure['delta_high']:+.3f})",
        )
        for suffix, group in groups.items()
        for name, figure in group.items()
        if isinstance(figure, Mapping) and "delta" in figure
    ]
    parts.append(_table(("figure", "base model", "adapter", "change (95 % interval)"), rows))
    parts.append(f"{metrics['num_prompts']} prompts, {metrics['num_images']} images of each model, {seconds:.0f} s.")
    return "\n\n".join([*parts, *filter(None, pictures), training_description(params)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |" for cells in lines)
