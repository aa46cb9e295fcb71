"""Location of the runs, the connection to it, and the experiment."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from customdiff.files import project_home
from customdiff.redaction import redact

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"

# MLflow's defaults block for minutes on an unreachable server, print messages and progress bars, and send telemetry.
# Variables that the user has set take precedence.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",  # one write per second instead of one per step
}
UPLOAD_SECONDS = 60  # request timeout for artifacts

# Without a kind, the pages of an experiment are those for language models until MLflow has seen enough runs.
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": """\
Adapters that teach a text-to-image model a subject from a few photos
([Custom Diffusion](https://arxiv.org/abs/2212.04488)), one run per training.

| figure | meaning |
| --- | --- |
| `evaluation/image_alignment` | similarity of generated images to the photos; higher is better |
| `evaluation/text_alignment` | similarity of generated images to their prompts; an adapter usually loses a little |
| `evaluation/..._delta` | the change from the base model |
| `evaluation/score` | what decides which version is `champion` (`tracking.score` in params.yaml) |

Each checkpoint is a model on the *Models* page. Evaluated adapters are registered as `customdiff-<concepts>`.
""",
}


@dataclass(frozen=True)
class Store:
    """Location of the runs.

    Attributes:
        uri: MLflow tracking URI.
        artifacts: folder for artifacts of a local store; None for a server.
    """

    uri: str
    artifacts: Path | None

    @classmethod
    def of(cls, folder: Path | str | None = None) -> "Store":
        """The store that MLFLOW_TRACKING_URI names; else mlflow.db in `folder`, by default the project's folder."""
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return cls(os.environ["MLFLOW_TRACKING_URI"], None)
        home = Path(folder).resolve() if folder else project_home()
        return cls(f"sqlite:///{home / DATABASE}", home / ARTIFACTS)


def connect(store: Store | None = None) -> Any:
    """MLflow's client of a store, with `SETTINGS`; None: the default store."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # our own warning names the cause
    return MlflowClient((store or Store.of()).uri)


def experiment_id(client: Any, store: Store, name: str) -> str:
    """Id of an experiment, which is created if it does not exist."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = store.artifacts.as_uri() if store.artifacts else None
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process has just created it
    for key, value in EXPERIMENT_TAGS.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


@contextmanager
def upload_timeout() -> Iterator[None]:
    """Raise MLflow's request timeout, which it reads from the environment at each request."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(UPLOAD_SECONDS, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def warn(store: str, problem: BaseException | str, consequence: str) -> None:
    """Print one line with the store's address without its secrets, the root cause and the consequence."""
    while isinstance(problem, BaseException) and (cause := problem.__cause__ or problem.__context__):
        problem = cause
    reason = " ".join(redact(str(problem)).split())[:160] or type(problem).__name__
    line = redact(f"warning: MLflow at {store}: {reason}; {consequence}")
    tqdm.write(line, file=sys.stderr)  # keeps a progress bar whole
