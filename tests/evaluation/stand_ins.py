"""What the evaluation tests share: a judge whose cosines are worked out by hand, plain images, scores from numbers."""

from pathlib import Path
from typing import ClassVar

import numpy as np
from conftest import concept_values
from PIL import Image

from customdiff.config import Base, Concept, Evaluate
from customdiff.evaluation.generation import Generation
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.scores import PromptScore

BOTH = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
PROMPTS = [
    Prompt("a {} on red", ("cat",), "scene"),
    Prompt("the {}", ("dog",), "style"),
    Prompt("a {1} and a {2}", ("cat", "dog")),
]


class Judge:
    """Embeds an image at the angle that its mean red names, in degrees; a text at its number, or ten times its length.

    So the cosine of two plain images is that of the difference of their reds.
    """

    def images(self, images):
        return _unit([np.asarray(image.convert("RGB"), float)[..., 0].mean() for image in images])

    def text(self, texts):
        return _unit([float(text) if text.isdecimal() else 10.0 * len(text) for text in texts])


def _unit(degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def plain(color, size=(8, 8)) -> Image.Image:
    """An image of one color: a name, (R, G, B), or only its red."""
    return Image.new("RGB", size, (color, 0, 0) if isinstance(color, int) else color)


def generation(model: Path, cache: Path | None = None, kind: type = Generation, **evaluate) -> Generation:
    """A generation of two images per prompt in two steps, of the concepts `BOTH`."""
    settings = Evaluate(**{"num_images": 2, "steps": 2, "bootstrap": 100} | evaluate)
    concepts = {name: Concept.model_validate(values) for name, values in BOTH.items()}
    return kind(Base(model=str(model), device="cpu"), settings, concepts, cache)


class CountingGeneration(Generation):
    """Counts the base models that it loads, and the UNet evaluations of all of them."""

    counts: ClassVar[dict[str, int]] = {}

    def load_base(self):
        pipe = super().load_base()
        self.counts["loads"] = self.counts.get("loads", 0) + 1
        pipe.unet.register_forward_pre_hook(
            lambda *_: self.counts.update(evaluations=self.counts.get("evaluations", 0) + 1)
        )
        return pipe


def score(prompt: Prompt, base: tuple[float, float], adapter: tuple[float, float]) -> PromptScore:
    """A score from text and image alignment of both models."""
    names = ("text_alignment", "image_alignment")
    return PromptScore(prompt, *(dict(zip(names, each, strict=True)) for each in (base, adapter)))
