"""The class of a subject, proposed from its photos by zero-shot classification with CLIP (Radford et al. 2021)."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from customdiff.config import Params
from customdiff.models.clip import Clip

TEMPLATES = ("a {}", "photo of a {}")
MAX_FILES = 20_000  # files of a pool that are read for its words
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
    """The subjects that the pool of class images names in its .json files, in alphabetical order; [] without any."""
    pool = Path(params.retrieve.index.pool)
    if params.retrieve.backend != "index" or not pool.is_dir():
        return []
    words: set[str] = set()
    for data in islice(_json_files(pool), MAX_FILES):
        try:
            words |= {str(subject) for subject in json.loads(data).get("subjects", [])}
        except (ValueError, AttributeError, TypeError):
            continue  # another kind of .json
    return sorted(words)


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


def _json_files(pool: Path) -> Iterator[bytes]:
    """Contents of the .json files in a folder or in its tar archives."""
    for path in sorted(pool.rglob("*")):
        if path.suffix == ".json":
            yield path.read_bytes()
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                members = (member for member in tar if member.isfile() and member.name.endswith(".json"))
                for member in members:
                    if file := tar.extractfile(member):
                        yield file.read()
