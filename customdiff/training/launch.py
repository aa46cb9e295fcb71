"""Command line of `accelerate launch` for training in several processes, its configuration, and what it excludes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from customdiff.config import Train
from customdiff.errors import UserError

if TYPE_CHECKING:
    from accelerate.utils import DistributedType

DEFAULT_CONFIG = Path(".checkpoints/accelerate.yaml")


def command(train: Train, script: str) -> list[str]:
    """The `accelerate launch` command line that runs `script` in `train.launch.num_processes` processes.

    Without `train.launch.config_file` it uses Accelerate's basic configuration, as `accelerate config default` writes
    it, so no interactive questions are asked. With it, the file's settings for machines and parallelism apply.

    Raises:
        UserError: `config_file` does not exist.
    """
    launch = train.launch
    if launch.config_file and not Path(launch.config_file).is_file():
        raise UserError(
            f"train.launch.config_file: {launch.config_file} does not exist; null uses Accelerate's default"
        )
    config = launch.config_file or default_config()
    arguments = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    if not launch.config_file:
        # --multi_gpu selects torch's launcher, which starts CPU processes as well. Without it, several processes on a
        # CPU need MPI, and Accelerate silently starts a single process if MPI is missing.
        arguments += ["--multi_gpu", "--num_machines", "1", "--dynamo_backend", "no"]
    arguments += ["--num_processes", str(launch.num_processes)]
    return [*arguments, "--mixed_precision", train.mixed_precision, script]


def default_config(path: Path = DEFAULT_CONFIG) -> Path:
    """Write Accelerate's basic configuration to `path` unless the file exists; returns the path."""
    from accelerate.utils import write_basic_config

    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_basic_config(save_location=path)
    return path


def check_distributed_type(kind: "DistributedType") -> None:
    """Reject sharded training, because checkpoints are written from the main process's weights only.

    Raises:
        UserError: the Accelerate config selects FSDP, DeepSpeed or Megatron-LM.
    """
    from accelerate.utils import DistributedType

    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"train.launch.config_file: {kind.value} is not supported; use distributed_type MULTI_GPU or MULTI_CPU"
        )
