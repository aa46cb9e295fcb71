"""Non-blocking MLflow logging; failures never stop a run.

`start` opens a run, `resume` continues one, `for_evaluation` chooses between the two for `evaluate`. Each returns a
`Tracker`, whose methods put work into a queue that one thread empties. A store that cannot be reached, or that
disappears in the middle, costs one warning; from then on the tracker does nothing.
"""

import json
import logging
import os
import queue
import re
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

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
EVALUATED = "text_alignment"  # a run that has this metric has been evaluated
TRAINING_RUN = "customdiff.training_run"

# MLflow's defaults would block a training for minutes on a server that is gone, print lines and progress bars of its
# own, and report usage to its makers. Variables that the user has set take precedence.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
FLUSH_SECONDS = 2  # metrics of so long a time are sent as one batch
UPLOAD_SECONDS = 60  # a server may take so long to store a large file
LAST_SECONDS = 120  # how long `finish` waits for a store that still answers, for a large adapter's sake
MAX_VALUE, MAX_TAG, PARAMS_PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 100, 1000  # MLflow's limits


def start(settings: Tracking, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None) -> "Tracker":
    """Open a run.

    Args:
        settings: section `tracking` of params.yaml: whether to track, and the name of the experiment.
        store: folder whose mlflow.db is used if MLFLOW_TRACKING_URI is not set; None: the DVC project's folder, or
            else the working folder.
        tags: of the run; see `provenance.run_tags`.
    """
    return _open(settings, store, lambda client, found: _create(client, found, settings, tags or {}))


def resume(
    settings: Tracking, run_id: str, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> "Tracker":
    """Continue a run; open a new one if the store does not have it. See `start`."""

    def find(client: Any, found: _Store) -> str:
        if _find(client, run_id) is None:
            return _create(client, found, settings, tags or {})
        client.update_run(run_id, status="RUNNING")
        return run_id

    return _open(settings, store, find)


def for_evaluation(
    settings: Tracking, run_file: Path | str, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None
) -> "Tracker":
    """Continue the training's run; open a new one if it has been evaluated already or is not in the store.

    Args:
        run_file: the file that `Tracker.write_run_id` wrote at the end of training; it need not exist.
    """
    training_run = _read_run_id(Path(run_file))

    def find(client: Any, found: _Store) -> str:
        run = training_run and _find(client, training_run)
        if training_run and run and EVALUATED not in run.data.metrics:
            client.update_run(training_run, status="RUNNING")
            return training_run
        trained = {TRAINING_RUN: training_run} if training_run else {}
        return _create(client, found, settings, dict(tags or {}) | trained)

    return _open(settings, store, find)


class Tracker:
    """A run that is written in the background. Without a client all methods do nothing.

    As a context manager it ends its run as finished, failed or killed.

    Attributes:
        run_id: of the open run; None if nothing is tracked.
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
        """Log sections of params.yaml under dotted keys; None: all but `evaluate`, which the stage of that name adds.

        Parameters that the run has already stay as they are: MLflow does not change them.
        """
        chosen = set(sections) if sections is not None else set(Params.model_fields) - {"evaluate"}
        flat = flatten({name: value for name, value in params.model_dump().items() if name in chosen})

        def log(client: Any) -> None:
            from mlflow.entities import Param

            known = client.get_run(self.run_id).data.params
            new = [Param(key, value[:MAX_VALUE]) for key, value in flat.items() if key not in known]
            for first in range(0, len(new), PARAMS_PER_BATCH):
                client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_BATCH])

        self._put(log)

    def metrics(self, metrics: Mapping[str, float | None], step: int = 0, *, group: str = "train/") -> None:
        """Log metrics of one step; metrics of several steps are sent together.

        Args:
            metrics: by name; None values are skipped.
            step: counted from 1.
            group: prefix of each name that has no /. MLflow's page shows a group together, and metrics without one
                last.
        """
        if self._thread is None:
            return
        now = int(time.time() * 1000)
        with self._lock:
            waiting = bool(self._metrics)
            for name, value in metrics.items():
                if value is not None:
                    self._metrics.append((name if "/" in name else group + name, float(value), now, step))
        if not waiting:
            self._put(self._flush)

    def image(self, image: Image.Image, name: str, step: int = 0) -> None:
        """Log an image; images of one name form a series over steps."""
        key = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
        copy = image.copy()
        self._put(lambda client: client.log_image(self.run_id, copy, key=key, step=step))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Log a file or a folder, below `folder` of the run's artifacts; nothing if it does not exist."""

        def log(client: Any) -> None:
            with _timeout(UPLOAD_SECONDS):
                client.log_artifact(self.run_id, str(path), folder)

        if Path(path).exists():
            self._put(log)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""

        def log(client: Any) -> None:
            for key, value in tags.items():
                client.set_tag(self.run_id, key, str(value)[:MAX_TAG])

        self._put(log)

    def evaluation(self, params: Params, metrics: Mapping[str, float], results: Path, adapter: Path) -> None:
        """Log the results of `evaluate`, and everything needed to understand and use the adapter.

        Args:
            params: all sections; parameters that the training logged stay as they are.
            metrics: flat, by name; see `evaluation_metrics`.
            results: results/evaluate.
            adapter: models/adapter; its pickled files are not logged.
        """
        self.params(params, Params.model_fields)
        self.metrics(metrics, group="")
        for name in ("report.html", "contact_sheet.jpg", "metrics.json", "per_prompt.csv"):
            self.artifact(results / name, "evaluate")
        for file in sorted(adapter.iterdir()):
            if file.suffix != ".bin":
                self.artifact(file, "adapter")
        for name in ("params.yaml", "dvc.lock"):
            self.artifact(name)

    def write_run_id(self, path: Path | str) -> None:
        """Write the run's id to a JSON file, for `for_evaluation`."""
        with atomic_file(path) as incoming:
            incoming.write_text(json.dumps({"run_id": self.run_id}) + "\n", encoding="utf-8")

    def finish(self, status: str = "FINISHED") -> None:
        """Send what is queued and end the run: FINISHED, FAILED or KILLED. Further calls do nothing."""
        if self._thread is None:
            return
        self._put(lambda client: client.set_terminated(self.run_id, status))
        self._closing.set()
        self._tasks.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            _warn(self._store, f"no answer in {LAST_SECONDS} s", "the end of this run is not tracked")
        self._thread = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        killed = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.finish("KILLED" if killed else "FAILED" if kind else "FINISHED")

    def _put(self, task: Callable[[Any], None]) -> None:
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
    """Nested values under dotted keys: {"train": {"max_steps": 250}} -> {"train.max_steps": "250"}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def evaluation_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of metrics.json under flat names.

    Returns:
        For each metric `text_alignment`, `base_text_alignment`, `text_alignment_delta`, `..._delta_low` and
        `..._delta_high`; with several concepts also those of each, with `.<concept>` at the end.
    """
    concepts = metrics["concepts"] if len(metrics["concepts"]) > 1 else {}
    flat = {}
    for suffix, group in {"": metrics, **{f".{name}": own for name, own in concepts.items()}}.items():
        for name, values in group.items():
            if isinstance(values, Mapping) and "adapter" in values:
                flat |= {f"{name}{suffix}": values["adapter"], f"base_{name}{suffix}": values["base"]}
                flat |= {f"{name}_{end}{suffix}": values[end] for end in ("delta", "delta_low", "delta_high")}
    return flat


@dataclass(frozen=True)
class _Store:
    """Where runs are written.

    Attributes:
        uri: its MLflow address.
        artifacts: folder of the local store's artifacts; None: the server decides.
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
    """A tracker of the run whose id `find` returns, given a client and the store."""
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
    """The run; None if the store does not have it or it was deleted."""
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
    """Raise MLflow's request timeout; it reads the environment at each request."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def _warn(store: str, problem: BaseException | str, consequence: str) -> None:
    """Print one line: the store without credentials, the root cause, and the consequence."""
    while isinstance(problem, BaseException) and (problem.__cause__ or problem.__context__):
        problem = problem.__cause__ or problem.__context__
    reason = " ".join(str(problem).split())[:160] or type(problem).__name__
    line = re.sub(r"//[^/@\s]+@", "//", f"warning: MLflow at {store}: {reason}; {consequence}")
    tqdm.write(line, file=sys.stderr)  # keeps a progress bar whole
