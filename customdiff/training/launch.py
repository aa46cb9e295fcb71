"""Start training in several processes by `accelerate launch`, with a configuration that nobody is asked about."""

import sys
from pathlib import Path

from customdiff.config import Train
from customdiff.errors import UserError

DEFAULT_CONFIG = Path(".checkpoints/accelerate.yaml")


def command(train: Train, script: str) -> list[str]:
    """The `accelerate launch` command line that runs `script` in `train.launch.num_processes` processes.

    Without `train.launch.config_file` it uses accelerate's basic configuration, as `accelerate config default` writes
    it, made here where there is none yet: no question is asked, so it also works where no shell is interactive. With
    it, what is said there of machines, their addresses and the kind of parallelism stands.

    Raises:
        UserError: `config_file` does not exist.
    """
    launch = train.launch
    if launch.config_file and not Path(launch.config_file).is_file():
        raise UserError(
            f"train.launch.config_file: {launch.config_file} does not exist; null takes accelerate's default"
        )
    config = launch.config_file or default_config()
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if not launch.config_file:
        # --multi_gpu is accelerate's only way to torch's own launcher, and starts CPU processes too; without it several
        # processes on a CPU would need MPI, and in its absence accelerate starts a single one and says nothing.
        arguments += ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no"]
    arguments += ["--num_processes", str(launch.num_processes)]
    return [*arguments, "--mixed_precision", train.mixed_precision, script]


def default_config(path: Path = DEFAULT_CONFIG) -> Path:
    """Write accelerate's basic configuration to `path`, unless it is there."""
    from accelerate.utils import write_basic_config

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_basic_config(save_location=path)
    return path
