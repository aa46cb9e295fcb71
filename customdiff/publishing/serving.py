"""The model that `mlflow models serve` runs: prompts in, PNG images of an adapter out.

MLflow stores this file with the adapter and executes it when it loads the model. The base model is not stored. It is
the one that the adapter names, a folder relative to the working directory or a Hub repository with its revision, or
the one in the environment variable CUSTOMDIFF_BASE.
"""

import io
import os
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

from customdiff.adapters import adapter
from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models import base, sampling

BASE_VARIABLE = "CUSTOMDIFF_BASE"
MAX_IMAGES = 64  # of one request


class AdapterModel(PythonModel):
    """An adapter in a pipeline of its base model."""

    def load_context(self, context: Any) -> None:
        """Load the base model and inject the adapter.

        Raises:
            UserError: the base model is not here, or is another one than the adapter was trained on.
        """
        folder, settings = Path(context.artifacts["adapter"]), context.model_config
        chosen = adapter.read_config(folder).base_model(os.environ.get(BASE_VARIABLE))
        if settings["base_is_folder"]:
            _check_folder(chosen)
        self.pipe = base.load_pipeline(chosen, device=base.device(settings["device"]))
        sampling.set_scheduler(self.pipe, settings["scheduler"])
        adapter.load(self.pipe, folder)
        self.eta = settings["eta"]

    def predict(self, context, model_input: pandas.DataFrame, params=None):
        """Generate images.

        Args:
            context: unused.
            model_input: data frame with the column `prompt`.
            params: `seed` of each prompt's first image (the next one adds 1), `steps`, `guidance_scale`, `num_images`
                per prompt.

        Returns:
            A data frame with the columns `prompt`, `seed` and `image`, PNG files as bytes.
        """
        prompts, count = list(model_input["prompt"]), params["num_images"]
        if not 1 <= count * len(prompts) <= MAX_IMAGES:
            raise UserError(f"num_images: {count} for {len(prompts)} prompts; a request makes 1 to {MAX_IMAGES} images")
        requests = [(prompt, (params["seed"] + number) % 2**32) for prompt in prompts for number in range(count)]
        images = sampling.generate(
            self.pipe,
            [prompt for prompt, _ in requests],
            [seed for _, seed in requests],
            steps=params["steps"],
            guidance_scale=params["guidance_scale"],
            eta=self.eta,
            batch_size=4,
            progress=None,
        )
        rows = [(*request, _png(image)) for request, image in zip(requests, images, strict=True)]
        return pandas.DataFrame(rows, columns=["prompt", "seed", "image"])


def _check_folder(chosen: Base) -> None:
    if not Path(chosen.model).is_dir():
        raise UserError(
            f"base model {chosen.model} does not exist in {Path.cwd()}; start the server in the project's folder, or "
            f"set {BASE_VARIABLE} to the model's folder"
        )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


set_model(AdapterModel())
