"""The identity of a training run: everything that determines its weights, and what adapter.json says of it."""

import platform
from pathlib import Path

import accelerate
import diffusers
import torch
import transformers

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Params
from customdiff.files import model_hashes, sha256, source_hash
from customdiff.models import base
from customdiff.training.selection import Grader

# The code that determines the weights; `stages/` and the rest of the library only call it.
CODE = ("models", "training", "preparation/prepared_set.py", "adapters/adapter.py")


def run_identity(params: Params, prepared: Path, num_processes: int, grader: Grader | None = None) -> dict:
    """Everything that determines the weights of a run: two runs with equal identities end with the same weights.

    Code counts as well, so a run that was interrupted does not continue after an edit of `CODE`.

    Args:
        prepared: folder of the prepared sets, one per concept (data/prepared).
        grader: of the checkpoints; not used unless the parameters ask for grades.

    Raises:
        ValueError: checkpoints are graded, but there is no grader.
    """
    grades = params.train.grades_checkpoints
    if grades and grader is None:
        raise ValueError("train.select: best and train.patience need a grader")
    unused = set() if grades else {"checkpointing_steps", "select", "patience", "grading"}
    files = [path for name in params.concepts for path in sorted((prepared / name).iterdir())]
    return {
        "base": params.base.model_dump(exclude={"device"}) | {"files": model_hashes(params.base.model)},
        "device": base.device(params.base.device).type,
        "concepts": {
            name: concept.model_dump(exclude={"source", "holdout"}) for name, concept in params.concepts.items()
        },
        "train": params.train.model_dump(exclude={"validation", "launch", "checkpoints_total_limit"} | unused),
        "grader": grader.identity if grades and grader else None,
        "processes": num_processes,
        "prepared": {str(path.relative_to(prepared)): sha256(path) for path in files},
        "versions": library_versions(),
        "code": source_hash(*CODE),
    }


def library_versions() -> dict[str, str]:
    """Versions of Python (without its patch level, which changes no result) and of the libraries that training uses."""
    libraries = (torch, diffusers, transformers, accelerate)
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | {library.__name__: library.__version__ for library in libraries}


def adapter_config(params: Params, step: int) -> AdapterConfig:
    """The contents of adapter.json after a step of a run of these parameters."""
    train = params.train
    concepts = {
        name: {
            "modifier_token": concept.modifier_token,
            "initializer": concept.initializer_token or concept.class_prompt,
            "class_prompt": concept.class_prompt,
            "instance_prompt": concept.instance_prompt,
        }
        for name, concept in params.concepts.items()
    }
    return AdapterConfig.model_validate(
        {
            "base": params.base.model_dump(include={"model", "revision", "variant"}),
            "concepts": concepts,
            "method": train.method,
            "freeze_model": train.freeze_model,
            "lora_rank": train.lora_rank,
            "resolution": params.prepare.resolution,
            "steps": step,
            "seed": params.base.seed,
            "versions": library_versions(),
        }
    )
