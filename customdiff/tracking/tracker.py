"""Runs: opening or continuing one, and what stages log in it."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from customdiff.config import Params, Tracking
from customdiff.files import atomic_file, weights_hash
from customdiff.interrupts import Interrupted
from customdiff.redaction import redact
from customdiff.tracking.datasets import DataSet
from customdiff.tracking.figures import run_params
from customdiff.tracking.models import Model, log_model
from customdiff.tracking.store import Store, connect, experiment_id, upload_timeout, warn

EVALUATED = "evaluation/text_alignment"  # a run that has this metric has been evaluated
TRAINING_RUN = "customdiff.training_run"
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"
KEY_LENGTH = 150  # of an image's name; MLflow adds about 90 characters, and a file's name can have 255 bytes
REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's code for a request that no later attempt could mend
MAX_VALUE, MAX_TAG, PARAMS_PER_BATCH = 6000, 8000, 100  # MLflow's limits


def start(
    settings: Tracking,
    name: str,
    *,
    store: Path | str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> "Tracker":
    """Open a run.

    Args:
        settings: section `tracking` of params.yaml.
        name: of the run; see `run_name`.
        store: folder of mlflow.db if MLFLOW_TRACKING_URI is not set; None: the project's folder.
        tags: tags of the run; see `provenance.run_tags`.
        parent: id of the run that this one is a part of.
    """
    own = {PARENT: parent} if parent else {}
    return _open(
        settings, store, lambda client, opened: _create(client, opened, settings, name, {**(tags or {}), **own})
    )


def resume(
    settings: Tracking,
    run_id: str,
    name: str,
    *,
    store: Path | str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
) -> "Tracker":
    """Continue a run; open a new one if the store does not have it. See `start`."""
    own = {PARENT: parent} if parent else {}

    def find(client: Any, opened: Store) -> str:
        if _find(client, run_id) is None:
            return _create(client, opened, settings, name, {**(tags or {}), **own})
        client.update_run(run_id, status="RUNNING")
        for key, value in own.items():
            client.set_tag(run_id, key, value)
        return run_id

    return _open(settings, store, find)


def for_evaluation(
    settings: Tracking,
    run_file: Path | str,
    adapter: Path | str,
    name: str,
    *,
    store: Path | str | None = None,
    tags: Mapping[str, str] | None = None,
) -> "Tracker":
    """Continue the run of the training; open a new one if it is already evaluated or not in the store. See `start`.

    Args:
        run_file: file that `Tracker.write_run_id` wrote; it may be missing.
        adapter: folder of the adapter that is evaluated; see `run_of`.
    """
    training_run = run_of(run_file, adapter).get("run_id")

    def find(client: Any, opened: Store) -> str:
        run = training_run and _find(client, training_run)
        if training_run and run and EVALUATED not in run.data.metrics:
            client.update_run(training_run, status="RUNNING")
            return training_run
        trained = {TRAINING_RUN: training_run} if training_run else {}
        return _create(client, opened, settings, name, dict(tags or {}) | trained)

    return _open(settings, store, find)


class Tracker:
    """An open run. Without a client all methods do nothing.

    Metrics and images are sent by MLflow's own background threads; everything else is sent before a method returns.
    What the store refuses, such as a value that is too long, is left out with a warning. The first other failure prints
    a warning, and nothing is sent afterwards. As a context manager it ends the run as finished, failed or killed.

    Attributes:
        run_id: id of the open run; None if nothing is tracked.
    """

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._store = getattr(client, "tracking_uri", "")
        self._pending: list[Any] = []
        self._monitor: Any = None

    def do(self, task: Callable[[Any], Any]) -> Any:
        """Call `task` with MLflow's client and return its result; None if nothing is tracked or the store fails."""
        if self._client is None:
            return None
        try:
            return task(self._client)
        except Exception as error:
            if getattr(error, "error_code", "") == REFUSED:
                warn(self._store, error, "left out of the run")
            else:
                self._give_up(error)
            return None

    def monitor_system(self) -> None:
        """Log CPU, memory and GPU use of the machine until `finish`, if MLflow's own switch for it is on."""

        def begin(client: Any) -> None:
            from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
                self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self._store)
                self._monitor.start()

        self.do(begin)

    def params(self, params: Params, *, evaluation: bool = False) -> None:
        """Log the parameters that tell runs apart, under dotted keys; see `run_params`.

        Parameters that the run already has are skipped, because MLflow rejects changes.

        Args:
            evaluation: also log those of section `evaluate`.
        """
        self.values(
            {key: value for key, value in run_params(params).items() if evaluation or not key.startswith("evaluate.")}
        )

    def values(self, values: Mapping[str, str]) -> None:
        """Log parameters by name; those that the run already has are skipped."""

        def log(client: Any) -> None:
            from mlflow.entities import Param

            known = client.get_run(self.run_id).data.params
            new = [Param(key, redact(value)[:MAX_VALUE]) for key, value in values.items() if key not in known]
            for first in range(0, len(new), PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_BATCH])

        self.do(log)

    def metrics(self, metrics: Mapping[str, float | None], step: int = 0, *, group: str = "train/") -> None:
        """Log metrics of one step in the background.

        Args:
            metrics: values by name; None, NaN and infinities are skipped.
            step: counted from 1.
            group: prefix of names without a /, by which MLflow's page groups charts.
        """

        def log(client: Any) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            points = [
                Metric(name if "/" in name else group + name, float(value), now, step)
                for name, value in metrics.items()
                if value is not None and math.isfinite(value)
            ]
            self._pending.append(client.log_batch(self.run_id, metrics=points, synchronous=False))

        self.do(log)

    def image(self, image: Image.Image, name: str, step: int = 0) -> None:
        """Log an image in the background; images with the same name form a series over steps.

        Args:
            name: title; characters that MLflow does not accept, such as < and >, are left out.
        """
        key = " ".join(re.sub(r"[^\w\-./ ]", "", name, flags=re.ASCII).split()) or "image"
        if len(key) > KEY_LENGTH:  # the hash keeps long prompts with one beginning apart
            key = f"{key[: KEY_LENGTH - 9].rstrip()} {hashlib.sha256(name.encode()).hexdigest()[:8]}"
        self.do(lambda client: client.log_image(self.run_id, image, key=key, step=step, synchronous=False))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file or folder below `folder` of the run's artifacts; a missing path is skipped."""

        def log(client: Any) -> None:
            with upload_timeout():
                client.log_artifact(self.run_id, str(path), folder)

        if Path(path).exists():
            self.do(log)

    def text_artifact(self, path: Path | str) -> None:
        """Log a text file without the secrets in its addresses; a missing file is skipped."""
        path = Path(path)
        if path.exists():
            text = redact(path.read_text(encoding="utf-8"))
            self.do(lambda client: client.log_text(self.run_id, text, path.name))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

        def log(client: Any) -> None:
            for key, value in tags.items():
                client.set_tag(self.run_id, key, str(value)[:MAX_TAG])

        self.do(log)

    def description(self, text: str) -> None:
        """Set the description on the run's page, in Markdown."""
        self.tags({NOTE: text})

    def inputs(self, datasets: Sequence[DataSet]) -> None:
        """Log the data sets that the run uses."""
        self.do(lambda client: client.log_inputs(self.run_id, datasets=[each.as_input() for each in datasets]))

    def model(self, model: Model, files: Callable[[Any], AbstractContextManager[Path]]) -> Any:
        """Log a model and return MLflow's `LoggedModel`, or None; see `models.log_model`."""
        return self.do(lambda client: log_model(client, str(self.run_id), model, files))

    def picture(self, title: str, path: Path | None) -> str:
        """Log an image and return Markdown that shows it in the run's description; empty if there is no image."""
        if path is None or self._client is None:
            return ""
        self.artifact(path, "pictures")
        return f"![{title}](get-artifact?path=pictures/{path.name}&run_uuid={self.run_id})"

    def write_run_id(self, path: Path | str) -> None:
        """Write the ids of the run and its experiment to a JSON file, for `for_evaluation` and links to the run."""
        run = self.do(lambda client: client.get_run(self.run_id))
        ids = {"run_id": self.run_id, "experiment_id": run.info.experiment_id if run else None}
        with atomic_file(path) as incoming:
            incoming.write_text(json.dumps(ids) + "\n", encoding="utf-8")

    def finish(self, status: str = "FINISHED") -> None:
        """Wait for metrics that are still being sent, and end the run as FINISHED, FAILED or KILLED; once."""
        if self._monitor is not None:
            self._monitor.finish()
        client = self._client
        for operation in self._pending:
            self.do(lambda _, sent=operation: sent.wait())  # type: ignore[misc]
        if self._client is client:
            self.do(lambda client: client.set_terminated(self.run_id, status))
        else:  # a run must not stay open because one of its values was lost
            with suppress(Exception):
                client.set_terminated(self.run_id, status)
        self._client, self._monitor = None, None
        self._pending.clear()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _give_up(self, error: Exception) -> None:
        self._client = None
        warn(self._store, error, "the rest of this run is not tracked")


def _open(settings: Tracking, folder: Path | str | None, find: Callable[[Any, Store], str]) -> Tracker:
    """Open a tracker of the run whose id `find` returns for a client and a store."""
    if not settings.enabled:
        return Tracker()
    store = Store.of(folder)
    try:
        client = connect(store)
        return Tracker(client, find(client, store))
    except Exception as error:
        warn(store.uri, error, "this run is not tracked")
        return Tracker()


def _create(client: Any, store: Store, settings: Tracking, name: str, tags: Mapping[str, str]) -> str:
    experiment = experiment_id(client, store, settings.experiment)
    return client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id


def _find(client: Any, run_id: str) -> Any:
    """The run, or None if the store does not have it or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def add_adapter(run_file: Path, adapter: Path | str) -> None:
    """Write into a file of `Tracker.write_run_id` which adapter the run has trained."""
    ids = json.loads(run_file.read_text(encoding="utf-8")) | {"adapter": weights_hash(adapter)}
    run_file.write_text(json.dumps(ids) + "\n", encoding="utf-8")


def run_of(run_file: Path | str, adapter: Path | str) -> dict[str, str]:
    """The ids of the run that trained an adapter, from a file of `Tracker.write_run_id`; empty if it is of another.

    DVC may have restored the adapter of an earlier training, whose run that file no longer names.
    """
    try:
        ids = json.loads(Path(run_file).read_text(encoding="utf-8"))
        return ids if ids.get("adapter", "") in ("", weights_hash(adapter)) else {}
    except (OSError, ValueError, AttributeError):
        return {}
