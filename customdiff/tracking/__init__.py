"""MLflow: runs, data sets and models. Logging never stops a stage, and metrics never delay a training step.

`start` opens a run, `resume` continues one, and `for_evaluation` selects one of the two for `evaluate`. If the store
cannot be reached, or becomes unreachable later, a `Tracker` prints one warning and does nothing from then on.
"""

from customdiff.tracking.children import checkpoint_models, log_child
from customdiff.tracking.datasets import DataSet, prompt_set, training_sets
from customdiff.tracking.figures import EVALUATION, evaluation_metrics, flatten, run_params, score
from customdiff.tracking.models import Model, model_name
from customdiff.tracking.store import SETTINGS, connect
from customdiff.tracking.text import evaluation_description, run_name, training_description
from customdiff.tracking.tracker import (
    EVALUATED,
    TRAINING_RUN,
    Tracker,
    add_adapter,
    for_evaluation,
    resume,
    run_of,
    start,
)

__all__ = [
    "EVALUATED",
    "EVALUATION",
    "SETTINGS",
    "TRAINING_RUN",
    "DataSet",
    "Model",
    "Tracker",
    "add_adapter",
    "checkpoint_models",
    "connect",
    "evaluation_description",
    "evaluation_metrics",
    "flatten",
    "for_evaluation",
    "log_child",
    "model_name",
    "prompt_set",
    "resume",
    "run_name",
    "run_of",
    "run_params",
    "score",
    "start",
    "training_description",
    "training_sets",
]
