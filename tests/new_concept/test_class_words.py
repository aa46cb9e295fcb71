"""The class of a subject is proposed from its photos."""

import io
import json
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from customdiff import config
from customdiff.config import Params
from customdiff.models.clip import Clip
from customdiff.new_concept import class_words


@pytest.fixture(scope="module")
def scenes():
    """Scenes of the pool with one subject, by subject; its captions are the independent record of what they show."""
    files: dict[str, dict[str, bytes]] = {}
    with tarfile.open(ROOT / "data/pool/pool.tar") as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            files.setdefault(stem, {})[suffix] = tar.extractfile(member).read()
    facts = json.loads((ROOT / "data/pool/facts.json").read_text())
    found: dict[str, list[Image.Image]] = {}
    for key, parts in files.items():
        subjects = facts[key]["subjects"]
        if len(subjects) == 1:
            found.setdefault(subjects[0], []).append(Image.open(io.BytesIO(parts["jpg"])))
    return found


def test_the_words_are_the_subjects_of_the_pool(scenes, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = class_words.pool_words(config.load())
    assert words == sorted(set(words))
    assert set(scenes) <= set(words)
    assert not {"truck", ""} & set(words)


def test_without_an_index_there_are_no_words_of_a_pool(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    concepts = config.load(ROOT / "params.yaml").concepts
    assert class_words.pool_words(Params(concepts=concepts)) == []
    (tmp_path / "data/pool").mkdir(parents=True)
    facts = tmp_path / "data/pool/facts.json"
    for text, words in (('{"0": {"subjects": ["owl"]}}', ["owl"]), ('["another kind"]', []), ("{", [])):
        facts.write_text(text)
        assert class_words.pool_words(Params(concepts=concepts)) == words
    generated = Params.model_validate({"concepts": concepts, "retrieve": {"backend": "generate"}})
    assert class_words.pool_words(generated) == []
    assert class_words.clip_of(generated) == ("openai/clip-vit-base-patch32", "evaluate.clip")


def test_photos_of_common_individuals_are_named_by_class(scenes):
    """Of 20 subjects that look as the world's do, five photos each; by chance one in 66 would be right."""
    clip = Clip.load(ROOT / "data/clip")
    words = sorted(scenes)
    right = 0
    for word in words[::3][:20]:
        guesses = class_words.propose(clip, scenes[word][:5], words)
        assert np.isclose(sum(guess.probability for guess in guesses), 1, atol=1e-5)
        assert [guess.probability for guess in guesses] == sorted((g.probability for g in guesses), reverse=True)
        right += guesses[0].word == word
    assert right >= 15
