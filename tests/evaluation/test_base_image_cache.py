"""The base model's images are generated once for everything that determines them, and again when any of it changes."""

import os
import shutil

import numpy as np
import pytest
import torch
from stand_ins import generation, plain

from customdiff import files
from customdiff.evaluation import base_image_cache
from customdiff.models.sampling import SCHEDULERS, set_scheduler


@pytest.fixture
def pipe(tiny_base):
    return generation(tiny_base).load_base()


@pytest.fixture
def evaluate(tiny_base, tmp_path, pipe):
    """A call asks for images, which show their seeds, and returns pixels; `evaluate.calls` lists what is generated."""

    def call(texts=("a cat", "a dog"), seeds=(1, 2), generate=None, **settings):
        def generate_seeds():
            call.calls.append((texts, seeds))
            return [plain(seed) for seed in seeds]

        how = generation(tiny_base, tmp_path / "cache", **settings)
        images = base_image_cache.base_images(
            how.cache, pipe, how.base, how.settings, texts, seeds, generate or generate_seeds
        )
        return [np.asarray(image).tolist() for image in images]

    call.calls = []
    return call


def test_the_same_images_are_generated_once_with_the_same_pixels(evaluate):
    first = evaluate()
    assert evaluate() == first
    assert len(evaluate.calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": (1, 3)},
        {"texts": ("a cat", "a car")},
        {"steps": 3},
        {"guidance_scale": 3.0},
        {"eta": 0.5},
        {"precision": "bf16"},
        {"batch_size": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_request_or_setting_generates_new_images(evaluate, change):
    evaluate()
    evaluate(**change)
    assert len(evaluate.calls) == 2


def test_other_weights_behind_the_same_name_generate_new_images(evaluate, pipe):
    evaluate()
    with torch.no_grad():
        next(layer for layer in pipe.unet.modules() if getattr(layer, "is_cross_attention", False)).to_k.weight += 1
    evaluate()
    assert len(evaluate.calls) == 2


def test_other_code_of_the_models_generates_new_images(evaluate, tmp_path, monkeypatch):
    shutil.copytree(files.PACKAGE, tmp_path / "package")
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "package")
    evaluate()
    with open(tmp_path / "package/evaluation/report.py", "a") as file:
        file.write("# a comment\n")
    evaluate()
    assert len(evaluate.calls) == 1, "the report does not determine the images"
    with open(tmp_path / "package/models/sampling.py", "a") as file:
        file.write("# a comment\n")
    evaluate()
    assert len(evaluate.calls) == 2


def test_every_scheduler_has_images_of_its_own(evaluate, pipe):
    schedule = pipe.scheduler
    for name in SCHEDULERS:
        pipe.scheduler = schedule
        set_scheduler(pipe, name)
        evaluate()
    assert len(evaluate.calls) == len(SCHEDULERS)


def test_only_the_most_recently_used_sets_are_kept(evaluate, tmp_path):
    numbers = range(1, base_image_cache.SETS + 2)

    def ask(seed):
        evaluate(texts=("a cat",), seeds=(seed,))
        for folder in (tmp_path / "cache").iterdir():  # a second passes
            os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - 1))

    for seed in (*numbers[:-1], numbers[0], numbers[-1]):  # the second is now the one that was used longest ago
        ask(seed)
    assert len(list((tmp_path / "cache").iterdir())) == base_image_cache.SETS
    evaluate.calls.clear()
    ask(numbers[0])
    assert not evaluate.calls
    ask(numbers[1])
    assert evaluate.calls


def test_two_experiments_may_generate_the_same_images_at_once(evaluate, tmp_path):
    def while_another_does():
        evaluate(texts=("a cat",), seeds=(1,))
        return [plain(1)]

    first = evaluate(texts=("a cat",), seeds=(1,), generate=while_another_does)
    assert evaluate(texts=("a cat",), seeds=(1,), generate=lambda: pytest.fail("generated again")) == first
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_generation_that_is_stopped_caches_nothing(evaluate, tmp_path):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(generate=stopped)
    assert not (tmp_path / "cache").exists()


def test_queued_experiments_share_the_projects_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert base_image_cache.cache_folder() == tmp_path / ".base-images"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    assert base_image_cache.cache_folder() == tmp_path / "project/.base-images"
