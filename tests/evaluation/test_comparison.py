"""Methods and adapters side by side: the same shots for all, nothing trained twice, figures in their own rows."""

import csv

import numpy as np
import pytest
import yaml
from conftest import concept_values, noisy_images, tiny_params, write_prepared
from PIL import Image
from typer.testing import CliRunner

from customdiff import cli
from customdiff.adapters import adapter
from customdiff.errors import UserError
from customdiff.evaluation import comparison, scores
from customdiff.evaluation.scores import Pair, Prompt
from customdiff.tracking import Tracker
from customdiff.training import trainer
from customdiff.training.checkpoints import RunFolder


def untracked(run_id):
    return Tracker()


def test_a_method_changes_nothing_but_what_trains_and_its_rate(tiny_base):
    params = tiny_params(tiny_base, validation={"prompts": ["a cat"]}, learning_rate=2e-5)
    chosen = comparison.params_of(params, "lora")
    assert chosen.train.learning_rate == pytest.approx(2e-4), "ten times: 1e-4 of the LoRA script to 1e-5"
    assert comparison.params_of(params, "textual_inversion").train.learning_rate == pytest.approx(1e-3)
    assert comparison.params_of(params, "lora", 0.5).train.learning_rate == 0.5
    same = {"method": "custom_diffusion", "learning_rate": 2e-5, "validation": params.train.validation}
    assert chosen.train.model_copy(update=same) == params.train
    assert chosen.model_copy(update={"train": params.train}) == params


def test_a_finished_training_is_not_run_again_and_an_edited_one_is(tiny_base, tmp_path):
    params = tiny_params(tiny_base, max_steps=2)
    prepared = write_prepared(tmp_path / "prepared", params)
    run = comparison.train(params, prepared, tmp_path / "runs", untracked)
    written = (run.path / "metrics.json").stat().st_mtime_ns
    again = comparison.train(params, prepared, tmp_path / "runs", untracked)
    assert (again.path / "metrics.json").stat().st_mtime_ns == written
    facts = comparison.facts_of(again, params)
    learned = adapter.read(again.path / "adapter")
    assert facts["trained_parameters"] == sum(weight.numel() for weight in learned.weights.values()) + 32
    assert facts["learning_rate"] == pytest.approx(1e-3 * 2 * 2)
    edited = tiny_params(tiny_base, max_steps=3)
    assert RunFolder.finished(tmp_path / "runs", trainer.run_identity(edited, prepared, 1)) is None
    assert comparison.train(edited, prepared, tmp_path / "runs", untracked).path != run.path


class Judge:
    """Embeds an image by its mean colour, a text by its length."""

    def images(self, images):
        rows = np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def text(self, texts):
        rows = np.stack([np.array([len(text), 1, 1], np.float32) for text in texts])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def learn(base, folder, concepts, weight=0.5):
    """An adapter of `concepts`, saved."""
    params = tiny_params(base, concepts=concepts, max_steps=1, learning_rate=weight)
    prepared = write_prepared(folder / "prepared", params)
    return trainer.run(params, prepared, folder / "runs", untracked).path / "adapter"


@pytest.fixture
def two(tiny_base, tmp_path):
    """Parameters of two concepts, an adapter of both, and one of the cat alone."""
    both = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
    joint = learn(tiny_base, tmp_path / "joint", both)
    alone = learn(tiny_base, tmp_path / "alone", {"cat": both["cat"]})
    settings = tiny_params(tiny_base, concepts=both)
    evaluate = settings.evaluate.model_copy(update={"num_images": 2, "steps": 2, "bootstrap": 100})
    return settings.model_copy(update={"evaluate": evaluate}), {"joint": joint, "alone": alone}


PROMPTS = {
    "cat": [Prompt("a {} on red"), Prompt("a {} on the grass")],
    "dog": [Prompt("a {}")],
    "cat and dog": [Prompt("a {1} and a {2}")],
}


def test_an_adapter_draws_the_prompts_of_what_it_has_learned_as_evaluate_would(two):
    params, adapters = two
    instances = {name: [Image.new("RGB", (32, 32), color)] for name, color in (("cat", "red"), ("dog", "blue"))}
    graded = comparison.grade(adapters, params, PROMPTS, instances, Judge(), "cpu")
    assert list(graded["joint"].metrics["concepts"]) == ["cat", "dog", "cat and dog"]
    assert list(graded["alone"].metrics["concepts"]) == ["cat"]
    for name in adapters:  # the oracle: `evaluation.draw`, which knows one adapter at a time
        pipe = comparison.base.load_pipeline(params.base)
        comparison.sampling.set_scheduler(pipe, params.evaluate.scheduler)
        known = {concept: PROMPTS[concept] for concept in graded[name].metrics["concepts"]}
        expected = scores.draw(pipe, lambda pipe, name=name: adapter.load(pipe, adapters[name]), params, known)
        for found, wanted in zip(graded[name].pairs, expected, strict=True):
            assert (found.concept, found.text, found.number) == (wanted.concept, wanted.text, wanted.number)
            for kind in ("base", "customized"):
                difference = np.asarray(getattr(found, kind), int) - np.asarray(getattr(wanted, kind), int)
                assert np.abs(difference).max() <= 1  # of 255: the batches are cut elsewhere
    rows = comparison.table(graded)
    assert [(row["adapter"], row["concept"]) for row in rows] == [
        *(("base model", concept) for concept in ("cat", "dog", "cat and dog")),
        *(("joint", concept) for concept in ("cat", "dog", "cat and dog")),
        ("alone", "cat"),
    ]
    assert rows[3]["image_alignment_delta"] == pytest.approx(
        rows[3]["image_alignment"] - rows[0]["image_alignment"], abs=2e-6
    )
    sheet = comparison.sheet(graded)
    assert sheet.height > 4 * 96


def test_the_sheet_leaves_white_what_an_adapter_has_not_learned():
    def pair(concept, color):
        pictures = [Image.new("RGB", (8, 8), each) for each in ("red", color)]
        return Pair(concept, Prompt("a {}"), f"a {concept}", 0, *pictures)

    graded = {
        "joint": comparison.Graded([pair("cat", "blue"), pair("dog", "blue")], {}, {}),
        "alone": comparison.Graded([pair("cat", "lime")], {}, {}),
    }
    pixels = np.asarray(comparison.sheet(graded))
    area = {
        name: (pixels == np.array(color)).all(-1).sum() / 96**2
        for name, color in (("base", (255, 0, 0)), ("joint", (0, 0, 255)), ("alone", (0, 255, 0)))
    }
    assert area == {"base": 2, "joint": 2, "alone": 1}


def test_the_command_trains_grades_and_writes(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = tiny_params(tiny_base, max_steps=2)
    write_prepared(tmp_path / "data/prepared", params)
    noisy_images(tmp_path / "data/instances/cat", 2)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {} on red\n")
    values = params.model_dump(mode="json")
    values["evaluate"] |= {"prompts": "prompts", "num_images": 1, "steps": 1, "bootstrap": 100}
    values["tracking"]["enabled"] = False
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr("customdiff.models.clip.Clip.load", lambda *_: Judge())
    arguments = ["compare", "--methods", "textual_inversion,lora", "--learning-rate", "lora=0.25"]
    done = CliRunner().invoke(cli.commands, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    with open("results/compare/comparison.csv", newline="") as file:
        rows = {row["adapter"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base model", "textual_inversion", "lora"]
    assert float(rows["lora"]["learning_rate"]) == 0.25 * 4
    assert float(rows["textual_inversion"]["learning_rate"]) == pytest.approx(1e-3 * 50 * 2), "no class images beside"
    assert int(rows["textual_inversion"]["trained_parameters"]) == 32
    assert "| lora | cat |" in done.output
    assert (tmp_path / "results/compare/comparison.jpg").exists()
    with pytest.raises(UserError, match="--out: prompts is there already"):
        CliRunner().invoke(cli.commands, ["compare", "--out", "prompts"], catch_exceptions=False)
    assert (tmp_path / "prompts/default.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dreambooth"], "--methods: there is no dreambooth; use custom_diffusion"),
        (["--learning-rate", "lora=fast"], "--learning-rate: of lora must be a number above 0"),
        (["--learning-rate", "1e-4"], "--learning-rate: must be such as lora=1e-4"),
        (["models/a"], "NAME=FOLDER: must be such as"),
        (["a=nowhere"], "nowhere/adapter.json: no adapter found"),
    ],
)
def test_mistakes_are_one_line(tiny_base, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(tiny_base).model_dump(mode="json")))
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(cli.commands, ["compare", *arguments], catch_exceptions=False)
