"""What a training logs to MLflow besides its steps: settings and data sets first, checkpoints as models at the end."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from customdiff import tracking
from customdiff.config import Params
from customdiff.tracking import Model, Tracker
from customdiff.tracking.models import CHECKPOINT
from customdiff.tracking.pictures import validation_sheet
from customdiff.tracking.pyfunc import pyfunc_files
from customdiff.training import step_log
from customdiff.training.checkpoints import RunFolder, step_of
from customdiff.training.selection import Grade


def begin(tracker: Tracker, params: Params, prepared: Path) -> None:
    """Log parameters, description and data sets.

    Args:
        prepared: folder of the prepared sets (data/prepared), beside those of the instance and class images.
    """
    tracker.params(params)
    tracker.description(tracking.training_description(params))
    tracker.inputs(tracking.training_sets(params, prepared.parent))
    tracker.monitor_system()


def end(
    tracker: Tracker,
    params: Params,
    prepared: Path,
    folder: RunFolder,
    rows: Sequence[dict],
    seconds: float,
    grades: Sequence[Grade] = (),
) -> None:
    """Log the training time, and each checkpoint that was kept as a model with its losses and its grade.

    Args:
        rows: metrics of each step.
        grades: of the checkpoints.
    """
    by_step = {grade.step: grade.to_dict() for grade in grades}
    tracker.metrics({"seconds": round(seconds, 2)})
    with TemporaryDirectory() as scratch:
        sheet = validation_sheet(folder.path / "validation", Path(scratch, "validation.jpg"))
        picture = tracker.picture("Validation images by step", sheet)
    tracker.description("\n\n".join(filter(None, [picture, tracking.training_description(params)])))
    data = next(iter(tracking.training_sets(params, prepared.parent)), None)
    for checkpoint in folder.checkpoints():
        step = step_of(checkpoint)
        losses = {
            f"train/mean_{name.removeprefix('final_')}": value
            for name, value in step_log.summary(rows[:step], 0).items()
            if name.startswith("final_")
        }
        values = {f"grade/{name}": value for name, value in by_step.get(step, {}).items() if name != "step"}
        name = f"{'-'.join(params.concepts)}-step-{step}"
        settings = {"method": params.train.method, "step": str(step)}
        model = Model(name, CHECKPOINT, step, losses | values, step, data, params=settings)
        tracker.model(model, lambda entity, path=checkpoint: pyfunc_files(path, params, entity))  # type: ignore[misc]
