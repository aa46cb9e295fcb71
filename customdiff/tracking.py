"""Non-blocking MLflow logging; failures never stop a run.

`start` opens a run, `resume` continues one, and `for_evaluation` selects one of the two for `evaluate`. Each returns a
`Tracker`, whose methods add tasks to a queue that a background thread processes. If the store cannot be reached, or
becomes unreachable later, the tracker prints one warning and does nothing from then on.
"""

import json
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from customdiff.config import Params, Tracking
from customdiff.files import atomic_file, project_home
from customdiff.interrupts import Interrupted
from customdiff.redaction import redact

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
EVALUATED = "text_alignment"  # a run that has this metric has been evaluated
TRAINING_RUN = "customdiff.training_run"

# MLflow's defaults block for minutes on an unreachable server, print messages and progress bars, and send telemetry.
# Variables that the user has set take precedence.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
FLUSH_SECONDS = 2  # period of metric batches
UPLOAD_SECONDS = 60  # request timeout for artifacts
LAST_SECONDS = 120  # time that `finish` waits for queued uploads, such as a large adapter
MAX_VALUE, MAX_TAG, PARAMS_PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 100, 1000  # MLflow's limits


def start(settings: Tracking, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None) -> "Tracker":
    """Open a run.

    Args:
        settings: section `tracking` of params.yaml.
        store: folder of mlflow.db if MLFLOW_TRACKING_URI is not set; None: the project's folder.
        tags: tags of the run; see `provenance.run_tags`.
    """
    return _open(settings, store, lambda client, opened: _create(client, opened, settings, tags or {}))


def resume(
    settings: Tracking, run_id: str, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> "Tracker":
    """Continue a run; open a new one if the store does not have it. See `start`."""

    def find(client: Any, opened: _Store) -> str:
        if _find(client, run_id) is None:
            return _create(client, opened, settings, tags or {})
        client.update_run(run_id, status="RUNNING")
        return run_id

    return _open(settings, store, find)


def for_evaluation(
    settings: Tracking, run_file: Path | str, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> "Tracker":
    """Continue the run of the training; open a new one if it is already evaluated or not in the store. See `start`.

    Args:
        run_file: file that `Tracker.write_run_id` wrote; it may be missing.
    """
    training_run = _read_run_id(Path(run_file))

    def find(client: Any, opened: _Store) -> str:
        run = training_run and _find(client, training_run)
        if training_run and run and EVALUATED not in run.data.metrics:
            client.update_run(training_run, status="RUNNING")
            return training_run
        trained = {TRAINING_RUN: training_run} if training_run else {}
        return _create(client, opened, settings, dict(tags or {}) | trained)

    return _open(settings, store, find)


class Tracker:
    """A run that a background thread writes. Without a client all methods do nothing.

    As a context manager it ends the run as finished, failed or killed.

    Attributes:
        run_id: id of the open run; None if nothing is tracked.
    """

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._store = getattr(client, "tracking_uri", "")
        self._metrics: list = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True) if client else None
        if self._thread:
            self._thread.start()

    def params(self, params: Params, sections: Iterable[str] | None = None) -> None:
        """Log sections of params.yaml under dotted keys; None: all but `evaluate`, which that stage logs.

        Parameters that the run already has are skipped, because MLflow rejects changes.
        """
        chosen = set(sections) if sections is not None else set(Params.model_fields) - {"evaluate"}
        flat = flatten({name: value for name, value in params.model_dump().items() if name in chosen})

        def log(client: Any) -> None:
            from mlflow.entities import Param

            known = client.get_run(self.run_id).data.params
            new = [Param(key, value[:MAX_VALUE]) for key, value in flat.items() if key not in known]
            for first in range(0, len(new), PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_BATCH])

        self._enqueue(log)

    def metrics(self, metrics: Mapping[str, float | None], step: int = 0, *, group: str = "train/") -> None:
        """Log metrics of one step; metrics of several steps are sent in one batch.

        Args:
            metrics: values by name; None, NaN and infinities are skipped.
            step: counted from 1.
            group: prefix of names without a /, by which MLflow's page groups charts.
        """
        if self._thread is None:
            return
        now = int(time.time() * 1000)
        with self._lock:
            waiting = bool(self._metrics)
            for name, value in metrics.items():
                if value is not None and math.isfinite(value):
                    self._metrics.append((name if "/" in name else group + name, float(value), now, step))
        if not waiting:
            self._enqueue(self._flush)

    def image(self, image: Image.Image, name: str, step: int = 0) -> None:
        """Log an image; images with the same name form a series over steps."""
        key = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
        copy = image.copy()
        self._enqueue(lambda client: client.log_image(self.run_id, copy, key=key, step=step))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file or folder below `folder` of the run's artifacts; a missing path is skipped."""

        def log(client: Any) -> None:
            with _timeout(UPLOAD_SECONDS):
                client.log_artifact(self.run_id, str(path), folder)

        if Path(path).exists():
            self._enqueue(log)

    def text(self, text: str, name: str) -> None:
        """Log a text as an artifact."""
        self._enqueue(lambda client: client.log_text(self.run_id, text, name))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

        def log(client: Any) -> None:
            for key, value in tags.items():
                client.set_tag(self.run_id, key, str(value)[:MAX_TAG])

        self._enqueue(log)

    def evaluation(self, params: Params, metrics: Mapping[str, float], results: Path, adapter: Path) -> None:
        """Log the results of `evaluate`, the adapter, params.yaml and dvc.lock.

        Args:
            params: all of params.yaml; parameters that the training logged are skipped.
            metrics: values by name; see `evaluation_metrics`.
            results: folder of the results (results/evaluate).
            adapter: folder of the adapter (models/adapter); its pickled files are not logged.
        """
        self.params(params, Params.model_fields)
        self.metrics(metrics, group="")
        for name in ("report.html", "contact_sheet.jpg", "metrics.json", "per_prompt.csv"):
            self.artifact(results / name, "evaluate")
        for file in sorted(adapter.iterdir()):
            if file.suffix != ".bin":
                self.artifact(file, "adapter")
        for path in map(Path, ("params.yaml", "dvc.lock")):
            if path.is_file():
                self.text(redact(path.read_text(encoding="utf-8")), path.name)

    def write_run_id(self, path: Path | str) -> None:
        """Write the run's id to a JSON file, for `for_evaluation`."""
        with atomic_file(path) as incoming:
            incoming.write_text(json.dumps({"run_id": self.run_id}) + "\n", encoding="utf-8")

    def finish(self, status: str = "FINISHED") -> None:
        """Process queued tasks and end the run as FINISHED, FAILED or KILLED. Further calls do nothing."""
        if self._thread is None:
            return
        self._enqueue(lambda client: client.set_terminated(self.run_id, status))
        self._closing.set()
        self._tasks.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            _warn(self._store, f"no answer in {LAST_SECONDS} s", "the end of this run is not tracked")
        self._thread = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _enqueue(self, task: Callable[[Any], None]) -> None:
        if self._thread is not None:
            self._tasks.put(task)

    def _work(self) -> None:
        alive = True
        for task in iter(self._tasks.get, None):
            try:
                if alive:
                    task(self._client)
            except Exception as error:
                alive = False
                _warn(self._store, error, "the rest of this run is not tracked")

    def _flush(self, client: Any) -> None:
        from mlflow.entities import Metric

        self._closing.wait(FLUSH_SECONDS)
        with self._lock:
            metrics, self._metrics = self._metrics, []
        for first in range(0, len(metrics), METRICS_PER_BATCH):
            batch = metrics[first : first + METRICS_PER_BATCH]
            client.log_batch(self.run_id, metrics=[Metric(*metric) for metric in batch])


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
    """The metrics of metrics.json under flat names.

    Returns:
        For each metric `text_alignment`, `base_text_alignment`, `text_alignment_delta`, `..._delta_low` and
        `..._delta_high`; with several concepts also those of each, with `.<concept>` at the end.
    """
    concepts = metrics["concepts"] if len(metrics["concepts"]) > 1 else {}
    flat: dict[str, float] = {}
    for suffix, group in {"": metrics, **{f".{name}": own for name, own in concepts.items()}}.items():
        for name, values in group.items():
            if isinstance(values, Mapping) and "adapter" in values:
                flat |= {f"{name}{suffix}": values["adapter"], f"base_{name}{suffix}": values["base"]}
                flat |= {f"{name}_{end}{suffix}": values[end] for end in ("delta", "delta_low", "delta_high")}
    return flat


@dataclass(frozen=True)
class _Store:
    """Location of the runs.

    Attributes:
        uri: MLflow tracking URI.
        artifacts: folder for artifacts of a local store; None for a server.
    """

    uri: str
    artifacts: Path | None

    @classmethod
    def of(cls, folder: Path | str | None) -> "_Store":
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return cls(os.environ["MLFLOW_TRACKING_URI"], None)
        home = Path(folder).resolve() if folder else project_home()
        return cls(f"sqlite:///{home / DATABASE}", home / ARTIFACTS)


def _open(settings: Tracking, folder: Path | str | None, find: Callable[[Any, _Store], str]) -> Tracker:
    """Open a tracker of the run whose id `find` returns for a client and a store."""
    if not settings.enabled:
        return Tracker()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    store = _Store.of(folder)
    try:
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        client = MlflowClient(store.uri)
        return Tracker(client, find(client, store))
    except Exception as error:
        _warn(store.uri, error, "this run is not tracked")
        return Tracker()


def _create(client: Any, store: _Store, settings: Tracking, tags: Mapping[str, str]) -> str:
    name = settings.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        location = store.artifacts.as_uri() if store.artifacts else None
        experiment_id = client.create_experiment(name, artifact_location=location)
    return client.create_run(experiment_id, run_name=os.environ.get("DVC_EXP_NAME"), tags=dict(tags)).info.run_id


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


def _read_run_id(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _timeout(seconds: int) -> Iterator[None]:
    """Raise MLflow's request timeout, which it reads from the environment at each request."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def _warn(store: str, problem: BaseException | str, consequence: str) -> None:
    """Print one line with the store's address without its secrets, the root cause and the consequence."""
    while isinstance(problem, BaseException) and (cause := problem.__cause__ or problem.__context__):
        problem = cause
    reason = " ".join(str(problem).split())[:160] or type(problem).__name__
    line = redact(f"warning: MLflow at {store}: {reason}; {consequence}")
    tqdm.write(line, file=sys.stderr)  # keeps a progress bar whole
