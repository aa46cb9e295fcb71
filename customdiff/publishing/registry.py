"""Adapters in MLflow: results of an evaluation, registered versions, and downloads by `models:/` addresses."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from customdiff import tracking
from customdiff.adapters.config import CONFIG_FILE
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.redaction import redact
from customdiff.tracking import DataSet, Model, Tracker
from customdiff.tracking.models import SCORE, SCORED_ON, promote, register
from customdiff.tracking.pictures import preview, validation_sheet
from customdiff.tracking.pyfunc import ADAPTER, DIFFUSERS_FLAVOR_METHOD, diffusers_files, pyfunc_files

PREFIX = "models:/"
RESULTS = ("report.html", "contact_sheet.jpg", "metrics.json", "per_prompt.csv")


@dataclass(frozen=True)
class Judged:
    """What an evaluation says about an adapter, besides metrics.json.

    Attributes:
        verdict: sentences at the top of the run's description.
        figures: further metrics, such as `photo_share`.
        tags: of the run, such as the verdict as text.
        seconds: that the evaluation took.
    """

    verdict: Sequence[str]
    figures: dict[str, float]
    tags: Mapping[str, str]
    seconds: float


def log_evaluation(
    tracker: Tracker,
    params: Params,
    results: Path,
    adapter: Path,
    prompts: Sequence[str],
    judged: Judged,
) -> str | None:
    """Log the results of `evaluate`, and the adapter as a registered model.

    Args:
        params: all of params.yaml; parameters that the training logged are skipped.
        results: folder of the results (results/evaluate).
        adapter: folder of the adapter (models/adapter); its pickled files are not logged.
        prompts: that images were generated from.
        judged: the verdict.

    Returns:
        One line about the registered version and the champion; None if nothing is tracked.
    """
    metrics = json.loads((results / "metrics.json").read_text(encoding="utf-8"))
    graded_on = tracking.prompt_set(params.evaluate.prompts, prompts, metrics["num_images"])
    training = tracking.training_sets(params)
    score = tracking.score(params.tracking.score, metrics)
    tracker.params(params, evaluation=True)
    tracker.inputs([*training, graded_on])
    tracker.tags(judged.tags)
    for name in RESULTS:
        tracker.artifact(results / name, "evaluate")
    for name in ("params.yaml", "dvc.lock"):
        tracker.text_artifact(name)
    pictures = _pictures(tracker, results)
    tracker.description(tracking.evaluation_description(params, metrics, judged.verdict, pictures, judged.seconds))
    scored_on = _digest(params, graded_on, training)
    tags = {SCORE: f"{score:.6f}", SCORED_ON: scored_on}
    model = Model(
        name=f"{'-'.join(params.concepts)}-adapter",
        kind="adapter",
        step=params.train.max_steps,
        metrics=tracking.evaluation_metrics(metrics)
        | {tracking.EVALUATION + name: value for name, value in (judged.figures | {"score": score}).items()},
        data=graded_on,
        params=tracking.run_params(params),
        tags=tags,
    )
    logged = tracker.model(model, lambda entity: pyfunc_files(adapter, params, entity))
    if params.train.method == DIFFUSERS_FLAVOR_METHOD:
        plain = Model(f"{model.name}-diffusers", "adapter", model.step, params=model.params)
        tracker.model(plain, lambda entity: diffusers_files(adapter, params, entity))
    if logged is None:
        return None
    name = tracking.model_name(list(params.concepts))
    return tracker.do(lambda client: _register(client, logged, name, tags, " ".join(judged.verdict)))


def download(address: str) -> Path:
    """The adapter of a model in MLflow.

    Args:
        address: `models:/customdiff-cat@champion`, `models:/customdiff-cat/latest`, `models:/customdiff-cat/3`, or the
            id of a logged model, `models:/m-...`.

    Returns:
        The adapter's folder, in a temporary folder.

    Raises:
        UserError: the store cannot be reached, or has no such model, or the model has no adapter.
    """
    try:
        import mlflow.artifacts

        client = tracking.connect()
        folder = mlflow.artifacts.download_artifacts(
            f"{address}/{ADAPTER}", dst_path=mkdtemp(prefix="customdiff-"), tracking_uri=client.tracking_uri
        )
    except Exception as error:
        reason = " ".join(redact(str(error)).split())[:200]
        raise UserError(
            f"{address}: not in the MLflow store ({reason}); `make ui` shows its models, MLFLOW_TRACKING_URI names "
            "another store"
        ) from error
    if not Path(folder, CONFIG_FILE).is_file():
        raise UserError(f"{address}: has no adapter; name a model that customdiff logged")
    return Path(folder)


def _pictures(tracker: Tracker, results: Path) -> list[str]:
    """Log the validation images and a small contact sheet; returns Markdown that shows them."""
    with TemporaryDirectory() as scratch:
        validation = validation_sheet(results.parent / "train/validation", Path(scratch, "validation.jpg"))
        sheet = results / "contact_sheet.jpg"
        small = preview(sheet, Path(scratch, "contact_sheet.jpg")) if sheet.exists() else None
        return [
            tracker.picture("Validation images by step", validation),
            tracker.picture("Contact sheet: each prompt by the base model and by the adapter", small),
        ]


def _register(client: Any, logged: Any, name: str, tags: Mapping[str, str], description: str) -> str:
    version = register(client, logged, name, tags, description)
    return promote(client, version, float(tags[SCORE]), tags[SCORED_ON])


def _digest(params: Params, graded_on: DataSet, training: Sequence[DataSet]) -> str:
    """Digest of what scores depend on besides the adapter: scores with different digests are not compared."""
    settings = params.evaluate.model_dump(exclude={"batch_size", "bootstrap", "precision"})
    photos = [each.digest for each in training if "instance" in each.name]
    parts = [settings, graded_on.digest, photos, params.base.seed, params.tracking.score]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
