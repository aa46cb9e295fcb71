"""MLflow: the one place that knows it, and what it must never do: stop a run, or keep a step waiting.

`start` opens a run, `resume` goes on with one, `for_evaluation` chooses between the two for `evaluate`. Each
returns a `Tracker`, whose methods only put work into a queue that one thread empties. A store that cannot be
reached, or that goes away in the middle, costs one line of warning; from there on the tracker does nothing.
"""

import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tqdm import tqdm

from customdiff.config import Params
from customdiff.files import atomic_file, project_home

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
EVALUATED = "text_alignment"  # a run that has this metric has been evaluated
TRAINING_RUN = "customdiff.training_run"
DATA_STAGES = ("download-data", "retrieve-class-images", "prepare")

# MLflow's defaults would keep a training waiting for minutes on a server that is gone, print lines and
# progress bars of its own, and report usage to its makers. What the user has set goes first.
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


def start(params: Params, *, store: Path | str | None = None, tags: Mapping[str, str] | None = None) -> "Tracker":
    """Open a run in the experiment that params.yaml names.

    It is tagged with the git commit, whether the work tree differs from it, DVC's experiment name, and the
    hashes that dvc.lock holds of the data that goes in.

    Args:
        params: section `tracking` says whether and where.
        store: project folder whose mlflow.db is used where MLFLOW_TRACKING_URI is not set; None: DVC's
            project, else the working folder.
        tags: further tags.
    """
    return _open(params, store, lambda client, found: _create(client, found, params, tags or {}))


def resume(params: Params, run_id: str, *, store: Path | str | None = None) -> "Tracker":
    """Go on with a run; open a new one where the store does not have it."""

    def find(client: Any, found: _Store) -> str:
        if _find(client, run_id) is None:
            return _create(client, found, params, {})
        client.update_run(run_id, status="RUNNING")
        return run_id

    return _open(params, store, find)


def for_evaluation(params: Params, card: Path | str, *, store: Path | str | None = None) -> "Tracker":
    """Go on with the training's run; open a new one where that has been evaluated before or is not here.

    Args:
        card: the file that `Tracker.write_run_id` wrote at the end of training; it need not exist.
    """
    training_run = _read_run_id(Path(card))

    def find(client: Any, found: _Store) -> str:
        run = training_run and _find(client, training_run)
        if run and EVALUATED not in run.data.metrics:
            client.update_run(training_run, status="RUNNING")
            return training_run
        return _create(client, found, params, {TRAINING_RUN: training_run} if training_run else {})

    return _open(params, store, find)


class Tracker:
    """A run that is written to in the background. Without a client it takes everything and does nothing.

    As a context manager it ends its run as finished, failed, or killed.

    Attributes:
        run_id: of the open run; None where nothing is tracked.
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
        """Log sections of params.yaml, keys joined by dots; None: all but `evaluate`, which evaluate adds.

        What the run already has stays as it is: MLflow's parameters cannot change.
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
        """Log figures of one step; figures of several steps travel together.

        Args:
            metrics: by name; those that are None are left out.
            step: counted from 1.
            group: goes before each name that has no / in it. MLflow's page shows a group together, and figures
                without one last.
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
        """Log an image; images of one name make a series over steps."""
        key = "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
        copy = image.copy()
        self._put(lambda client: client.log_image(self.run_id, copy, key=key, step=step))

    def artifact(self, path: Path | str, folder: str | None = None) -> None:
        """Store a file or a whole folder with the run, below `folder`. What is not there is left out."""

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

    def evaluation(self, params: Params, metrics: Mapping[str, Any], results: Path, adapter: Path) -> None:
        """Log what `evaluate` found, and everything that it takes to understand and to use what was learned.

        Args:
            params: all sections; those that the training has logged stay.
            metrics: as in metrics.json.
            results: results/evaluate.
            adapter: models/adapter; the pickled twins of its files are left out.
        """
        self.params(params, Params.model_fields)
        self.metrics(evaluation_metrics(metrics), group="")
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
        """Write what is left and end the run: FINISHED, FAILED or KILLED. Further calls do nothing."""
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
    """The alignments of metrics.json, flat: intervals as `_low` and `_high`, of several concepts each as `.<name>`."""
    concepts = metrics["concepts"] if len(metrics["concepts"]) > 1 else {}
    flat = {}
    for suffix, figures in {"": metrics, **{f".{name}": own for name, own in concepts.items()}}.items():
        for name, value in figures.items():
            if "alignment" in name and isinstance(value, Sequence):
                flat |= {f"{name}_low{suffix}": value[0], f"{name}_high{suffix}": value[1]}
            elif "alignment" in name:
                flat[name + suffix] = value
    return flat


def project_tags(project: Path) -> dict[str, str]:
    """Where a run comes from: commit, uncommitted changes, DVC experiment, hashes of the data in dvc.lock."""
    tags = {}
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = tags["git.commit"] = commit
        tags["git.dirty"] = str(bool(_git(project, "status", "--porcelain", "--untracked-files=no"))).lower()
    if os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return tags | data_hashes(project / "dvc.lock")


def data_hashes(lock: Path) -> dict[str, str]:
    """Tags `data.<path>` with the MD5 that dvc.lock holds of each output of the data stages."""
    try:
        stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        return {
            f"data.{out['path'].removeprefix('data/')}": out["md5"]
            for name, stage in stages.items()
            if name.partition("@")[0] in DATA_STAGES
            for out in stage.get("outs", [])
            if "md5" in out
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


@dataclass(frozen=True)
class _Store:
    """Where runs are written, and what they are about.

    Attributes:
        uri: MLflow's address of it.
        artifacts: folder of the local store's artifacts; None: the server decides.
        project: folder whose git commit and dvc.lock tag the run.
    """

    uri: str
    artifacts: Path | None
    project: Path

    @classmethod
    def of(cls, folder: Path | str | None) -> "_Store":
        project = Path(folder or ".")
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return cls(os.environ["MLFLOW_TRACKING_URI"], None, project)
        home = Path(folder).resolve() if folder else project_home()
        return cls(f"sqlite:///{home / DATABASE}", home / ARTIFACTS, project)


def _open(params: Params, folder: Path | str | None, find: Callable[[Any, _Store], str]) -> Tracker:
    """A tracker on the run whose id `find` answers, given a client and the store."""
    if not params.tracking.enabled:
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


def _create(client: Any, store: _Store, params: Params, tags: Mapping[str, str]) -> str:
    name = params.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        location = store.artifacts.as_uri() if store.artifacts else None
        experiment_id = client.create_experiment(name, artifact_location=location)
    run_tags = project_tags(store.project) | dict(tags)
    return client.create_run(experiment_id, run_name=os.environ.get("DVC_EXP_NAME"), tags=run_tags).info.run_id


def _find(client: Any, run_id: str) -> Any:
    """The run, or None where the store does not have it (or has it in its bin)."""
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


def _git(project: Path, *arguments: str) -> str:
    command = ["git", "-C", str(project), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@contextmanager
def _timeout(seconds: int) -> Iterator[None]:
    """Let MLflow wait so long for an answer. It reads the environment at each request."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def _warn(store: str, problem: BaseException | str, consequence: str) -> None:
    """One line: which store, what went wrong at the root of it, and what that means. No password of an address."""
    while isinstance(problem, BaseException) and (problem.__cause__ or problem.__context__):
        problem = problem.__cause__ or problem.__context__
    reason = " ".join(str(problem).split())[:160] or type(problem).__name__
    line = re.sub(r"//[^/@\s]+@", "//", f"warning: MLflow at {store}: {reason}; {consequence}")
    tqdm.write(line, file=sys.stderr)  # keeps a progress bar whole
