"""Models in MLflow: checkpoints and adapters with their figures, and registered versions of them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from customdiff.tracking.datasets import DataSet
from customdiff.tracking.store import upload_timeout

CHAMPION, CHECKPOINT = "champion", "checkpoint"
SCORE, SCORED_ON = "customdiff.score", "customdiff.scored_on"


@dataclass(frozen=True)
class Model:
    """A model of a run.

    Attributes:
        name: such as `cat-step-50`; without `/` and `:`.
        kind: MLflow's model type, such as `adapter` or `checkpoint`.
        step: training step.
        metrics: its figures; of checkpoints losses, of adapters alignments.
        metrics_step: step of the figures; 0 for those that a run has once, which MLflow's pages then show as bars.
        data: the data set that the figures were measured on.
        params, tags: shown on its page.
    """

    name: str
    kind: str
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    metrics_step: int = 0
    data: DataSet | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


def model_name(concepts: Sequence[str]) -> str:
    """Name in the registry: `customdiff-cat`, `customdiff-cat-teapot`."""
    return f"customdiff-{'-'.join(concepts)}"


def log_model(client: Any, run_id: str, model: Model, files: Callable[[Any], AbstractContextManager[Path]]) -> Any:
    """Log a model with its figures and files.

    Args:
        files: makes a folder of the model's files, given MLflow's `LoggedModel`; see `pyfunc.pyfunc_files`.

    Returns:
        MLflow's `LoggedModel`.
    """
    from mlflow.entities import LoggedModelOutput

    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(
        experiment, model.name, run_id, dict(model.tags), dict(model.params), model.kind
    )
    with files(logged) as folder, upload_timeout():
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, model.step)])
    log_model_metrics(client, run_id, logged.model_id, model)
    return logged


def log_model_metrics(client: Any, run_id: str, model_id: str, model: Model) -> None:
    """Link figures to a model and to the data set that they were measured on."""
    data = {"dataset_name": model.data.name, "dataset_digest": model.data.digest} if model.data else {}
    for name, value in model.metrics.items():
        if not math.isfinite(value):
            continue
        client.log_metric(run_id, name, value, step=model.metrics_step, model_id=model_id, **data)


def register(client: Any, logged: Any, name: str, tags: Mapping[str, str], description: str) -> Any:
    """Add a version to the registry, under a registered model that is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Adapters of Custom Diffusion, one version per evaluated run.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name,
        f"models:/{logged.model_id}",
        run_id=logged.source_run_id,
        tags=dict(tags),
        description=description,
        model_id=logged.model_id,
    )
    link = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})  # as MLflow's `register_model` does
    return version


def find_checkpoints(client: Any, training_run: str) -> dict[int, str]:
    """Ids of the models of a training's checkpoints by step; empty if the store does not have the run."""
    from mlflow.exceptions import MlflowException

    try:
        experiment = client.get_run(training_run).info.experiment_id
    except MlflowException:
        return {}
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{training_run}'")
    return {int(each.params["step"]): each.model_id for each in found if each.model_type == CHECKPOINT}


def champion_of(client: Any, name: str) -> Any:
    """The version with the alias `champion`, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def promote(client: Any, version: Any, score: float, scored_on: str) -> str:
    """Make a version champion where its score beats the champion's on the same prompts, photos and judge.

    Returns:
        One line about the outcome.
    """
    name, champion = version.name, champion_of(client, version.name)
    outcome = f"{name} version {version.version}: score {score:.3f}"
    if champion is not None and champion.tags.get(SCORED_ON) != scored_on:
        return (
            f"{outcome}; version {champion.version} stays champion, because its score was measured with other prompts, "
            "photos or settings"
        )
    before = float(champion.tags.get(SCORE, "-inf")) if champion is not None else float("-inf")
    if score <= before:
        return f"{outcome}; version {champion.version} stays champion ({before:.3f})"
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return f"{outcome}; it is now champion"
