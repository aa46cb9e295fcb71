"""What the tab Play draws: the base model's image and the adapter's own, from the same seed."""

from pathlib import Path

import numpy as np
import pytest
from conftest import concept_values, random_adapter

from customdiff import config
from customdiff.adapters import adapter
from customdiff.app.player import Drawing, Player, adapter_folders, subjects_of
from customdiff.errors import UserError
from customdiff.models import base, sampling

SETTINGS = config.Evaluate(steps=4, guidance_scale=3.0, eta=0.5)


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory) -> tuple[Path, Path]:
    """Two adapters with different tokens."""
    folder = tmp_path_factory.mktemp("adapters")
    other = {"pot": concept_values("<new2>", "pot")}
    return random_adapter(tiny_base, folder / "a"), random_adapter(tiny_base, folder / "b", concepts=other, seed=1)


def drawn(tiny_base, folder: Path | None, prompt: str) -> np.ndarray:
    """The image that a fresh pipeline draws."""
    pipe = base.load_pipeline(config.Base(model=str(tiny_base)))
    sampling.set_scheduler(pipe, SETTINGS.scheduler)
    if folder:
        adapter.load(pipe, folder)
    (image,) = sampling.generate(pipe, [prompt], [7], steps=4, guidance_scale=3.0, eta=0.5, progress=None)
    return np.asarray(image)


def draw(player: Player, drawing: Drawing) -> list:
    return list(player.draw(drawing))


def test_images_are_those_of_fresh_pipelines_in_any_order(tiny_base, adapters):
    player, prompt = Player(SETTINGS, "cpu"), "photo of a <new1> cat"
    expected = [drawn(tiny_base, None, "photo of a cat"), drawn(tiny_base, adapters[0], prompt)]
    for strength in (1, 0.5, 1):
        images = draw(player, Drawing(prompt, adapters[:1], 7, 4, 3.0, strength))
        np.testing.assert_array_equal(images[0], expected[0])
        assert np.array_equal(images[1], expected[1]) == (strength == 1)


def test_two_adapters_side_by_side(tiny_base, adapters):
    images = draw(Player(SETTINGS, "cpu"), Drawing("a <new2> pot", adapters, 7, 4, 3.0))
    assert len(images) == 3
    np.testing.assert_array_equal(images[2], drawn(tiny_base, adapters[1], "a <new2> pot"))


def test_an_adapter_that_was_trained_again_is_loaded_again(tiny_base, tmp_path):
    player, folder = Player(SETTINGS, "cpu"), tmp_path / "a"
    first = draw(player, Drawing("a <new1> cat", (random_adapter(tiny_base, folder),), 7, 4, 3.0))
    second = draw(player, Drawing("a <new1> cat", (random_adapter(tiny_base, folder, seed=5),), 7, 4, 3.0))
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


@pytest.mark.parametrize("prompt", ["", "  ", "a \x07 cat"])
def test_a_prompt_that_is_none_is_refused(adapters, prompt):
    with pytest.raises(UserError, match="the prompt is empty"):
        draw(Player(SETTINGS, "cpu"), Drawing(prompt, adapters[:1], 7, 4, 3.0))


def test_markup_in_a_prompt_is_words(adapters):
    assert len(draw(Player(SETTINGS, "cpu"), Drawing("<script>alert(1)</script> cat", adapters[:1], 7, 4, 3.0))) == 2


def test_the_adapters_of_a_project(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert adapter_folders() == {}
    for name in ("models/adapter", "models/merged", "data/adapters/cat", ".checkpoints/run/step-000010"):
        random_adapter(tiny_base, tmp_path / name)
    (tmp_path / "models/empty").mkdir()
    labels = {path.as_posix(): label for path, label in adapter_folders().items()}
    assert labels == {
        "models/adapter": "last training",
        ".checkpoints/run/step-000010": "checkpoint after 10 steps",
        "models/merged": "models/merged",
        "data/adapters/cat": "data/adapters/cat",
    }
    assert subjects_of(list(adapter_folders())) == ["<new1> cat"]
