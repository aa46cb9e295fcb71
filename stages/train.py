"""train: train all concepts jointly, in this process or in several started by `accelerate launch`."""

import os
from pathlib import Path

from customdiff.errors import one_line_errors


def main() -> None:
    """Train, or continue an interrupted training."""
    from customdiff import config
    from customdiff.training.launch import command

    params = config.load()
    if params.train.launch.num_processes > 1 and "LOCAL_RANK" not in os.environ:
        arguments = command(params.train, __file__)
        os.execv(arguments[0], arguments)

    from customdiff import provenance, tracking
    from customdiff.evaluation.checkpoint_grader import CheckpointGrader
    from customdiff.training import trainer
    from customdiff.training.checkpoints import RUNS

    def tracker_for(run_id: str | None) -> tracking.Tracker:
        name, tags = tracking.run_name(params), provenance.run_tags()
        if run_id:
            return tracking.resume(params.tracking, run_id, name, tags=tags)
        return tracking.start(params.tracking, name, tags=tags)

    grader = CheckpointGrader.load(params) if params.train.grades_checkpoints else None
    run = trainer.run(params, Path("data/prepared"), RUNS, tracker_for, grader)
    if int(os.environ.get("RANK", 0)) == 0:
        run.copy_results(Path("models/adapter"), Path("results/train"))


if __name__ == "__main__":
    with one_line_errors():
        main()
