"""Runs with parts: one parent for a comparison or a sweep, and a child for each method, adapter or checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from customdiff.config import Tracking
from customdiff.tracking.figures import EVALUATION
from customdiff.tracking.models import CHECKPOINT, Model, find_checkpoints, log_model_metrics
from customdiff.tracking.tracker import Tracker, resume, start


def log_child(
    settings: Tracking,
    parent: Tracker,
    name: str,
    figures: Mapping[str, float],
    values: Mapping[str, str],
    *,
    run_id: str | None = None,
    model_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    store: Path | str | None = None,
) -> None:
    """Log the figures of one part in a run below `parent`; nothing if the parent is not tracked.

    Args:
        settings: section `tracking` of params.yaml.
        figures: by name, without `EVALUATION`.
        values: parameters that tell the parts apart, such as the method.
        run_id: a child that the part has already, from its training; None: a new one.
        model_id: MLflow's model that the figures belong to.
        tags: of a new run.
        store: see `start`.
    """
    if parent.run_id is None:
        return
    if run_id:
        opened = resume(settings, run_id, name, tags=tags, parent=parent.run_id, store=store)
    else:
        opened = start(settings, name, tags=tags, parent=parent.run_id, store=store)
    with opened as child:
        child.values(values)
        if model_id:
            model = Model(name, CHECKPOINT, 0, {EVALUATION + key: value for key, value in figures.items()})
            child.do(lambda client: log_model_metrics(client, str(child.run_id), model_id, model))
        else:
            child.metrics(figures, group=EVALUATION)


def checkpoint_models(tracker: Tracker, training_run: str | None) -> dict[int, str]:
    """Ids of the models that a training logged for its checkpoints, by step; empty if nothing is tracked."""
    if training_run is None:
        return {}
    return tracker.do(lambda client: find_checkpoints(client, training_run)) or {}
