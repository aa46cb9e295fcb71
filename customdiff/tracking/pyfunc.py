"""Files of an adapter as a model that MLflow serves: adapter, code, signature, input example, pinned requirements."""

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from customdiff.config import Concept, Params
from customdiff.files import PACKAGE

SCRIPT = PACKAGE / "publishing" / "serving.py"
ADAPTER = "artifacts/adapter"  # where the adapter lies in a model's files
REQUIREMENTS = (
    "mlflow",
    "accelerate",
    "diffusers",
    "huggingface-hub",
    "numpy",
    "pandas",
    "peft",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
    "tqdm",
    "transformers",
)
DIFFUSERS_FLAVOR_METHOD = "lora"  # the only method that MLflow's own flavor can load


@contextmanager
def pyfunc_files(adapter: Path, params: Params, logged: Any) -> Iterator[Path]:
    """A temporary folder with the files of a pyfunc model.

    Args:
        adapter: folder of the adapter; its pickled files are left out.
        params: for the settings that images are generated with by default, those of section `evaluate`.
        logged: MLflow's `LoggedModel` that the files belong to.
    """
    import mlflow.pyfunc

    settings = params.evaluate
    with TemporaryDirectory() as folder, _quiet():
        copy = Path(folder, "adapter")
        shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("*.bin", "*.pt"))
        mlflow.pyfunc.save_model(
            Path(folder, "model"),
            python_model=str(SCRIPT),
            artifacts={"adapter": str(copy)},
            code_paths=[str(PACKAGE)],
            signature=signature(params),
            input_example=(input_example(params), {"seed": params.base.seed}),
            pip_requirements=requirements(),
            model_config={
                "base": params.base.model,
                "revision": params.base.revision,
                "base_is_folder": Path(params.base.model).is_dir(),
                "device": "auto",
                "scheduler": settings.scheduler,
                "eta": settings.eta,
            },
            mlflow_model=_mlflow_model(logged),
        )
        yield Path(folder, "model")


@contextmanager
def diffusers_files(adapter: Path, params: Params, logged: Any) -> Iterator[Path]:
    """A temporary folder with the files of a LoRA adapter in MLflow's own `diffusers` flavor.

    The flavor knows no modifier tokens. They are fixed with method `lora`, so the initializer's words replace them.
    """
    import mlflow.diffusers

    with TemporaryDirectory() as folder, _quiet():
        mlflow.diffusers.save_model(
            str(adapter / "pytorch_lora_weights.safetensors"),
            str(Path(folder, "model")),
            params.base.model,
            input_example=None,
            mlflow_model=_mlflow_model(logged),
        )
        yield Path(folder, "model")


def signature(params: Params) -> Any:
    """Prompts and settings in, PNG images out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    settings = params.evaluate
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "image")]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", params.base.seed),
                ParamSpec("steps", "long", settings.steps),
                ParamSpec("guidance_scale", "double", settings.guidance_scale),
                ParamSpec("num_images", "long", 1),
            ]
        ),
    )


def input_example(params: Params) -> Any:
    """A prompt for each concept."""
    import pandas

    return pandas.DataFrame({"prompt": [f"a {_subject(concept)}" for concept in params.concepts.values()]})


def requirements() -> list[str]:
    """The installed versions of the libraries that generate images."""
    pinned = []
    for name in REQUIREMENTS:
        try:
            pinned.append(f"{name}=={re.sub(r'[+].*', '', version(name))}")
        except PackageNotFoundError:
            continue
    return pinned


def _subject(concept: Concept) -> str:
    return f"{concept.modifier_token} {concept.class_prompt}"


def _mlflow_model(logged: Any) -> Any:
    from mlflow.models import Model

    return Model(
        artifact_path=logged.artifact_location,
        run_id=logged.source_run_id,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence advice about type hints of MLflow and its dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
