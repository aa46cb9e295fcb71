"""The class of a subject, proposed from its photos by zero-shot classification with CLIP (Radford et al. 2021)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from customdiff.config import Params
from customdiff.models.clip import Clip

TEMPLATES = ("a {}", "photo of a {}")
COMMON_WORDS = """
person man woman child baby dog cat bird fish horse cow sheep rabbit hamster turtle toy doll figurine sculpture painting
car truck motorcycle bicycle boat airplane house building chair table sofa lamp clock watch vase teapot mug cup bowl
bottle plate backpack bag hat shoe shirt dress jacket glasses sunglasses ring necklace book phone camera laptop
headphones guitar piano umbrella ball robot plant flower tree mushroom cake bread fruit
""".split()  # noqa: SIM905  # candidates without a pool


class Guess(NamedTuple):
    """A class and its probability among the candidates."""

    word: str
    probability: float


def clip_of(params: Params) -> tuple[str, str]:
    """Folder or Hub name of the CLIP model that proposes the class, and the key of params.yaml that names it."""
    if params.retrieve.backend == "index":
        return params.retrieve.index.clip, "retrieve.index.clip"
    return params.evaluate.clip, "evaluate.clip"


def pool_words(params: Params) -> list[str]:
    """The subjects that `facts.json` in the pool of class images lists, in alphabetical order; [] without that file."""
    if params.retrieve.backend != "index":
        return []
    try:
        facts = json.loads(Path(params.retrieve.index.pool, "facts.json").read_text(encoding="utf-8"))
        return sorted({str(subject) for fact in facts.values() for subject in fact["subjects"]})
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def propose(clip: Clip, photos: Sequence[Image.Image], words: Sequence[str]) -> list[Guess]:
    """Probability of each word as the class of all photos, most probable first.

    It is the softmax over the words of CLIP's logits, averaged over photos and over `TEMPLATES`.
    """
    texts = np.mean([clip.text([template.format(word) for word in words]) for template in TEMPLATES], 0)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    scale = float(clip.model.logit_scale.exp())
    logits = scale * (clip.images(photos) @ texts.T).mean(0)
    weights = np.exp(logits - logits.max())
    order = np.argsort(-logits, kind="stable")
    return [Guess(words[i], float(weights[i] / weights.sum())) for i in order]
