"""Methods and adapters beside one another: only the method differs, nothing is trained twice, each row has its own."""

import csv
import re

import numpy as np
import pytest
import yaml
from conftest import noisy_images, random_adapter, tiny_params, write_prepared
from stand_ins import BOTH, PROMPTS, Judge, generation, plain, score
from typer.testing import CliRunner

from customdiff import cli
from customdiff.adapters import adapter
from customdiff.errors import UserError
from customdiff.evaluation import comparison, scores
from customdiff.evaluation.generation import ImagePair, generate_pairs
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import bootstrap_interval
from customdiff.evaluation.prompts import Prompt
from customdiff.models import clip
from customdiff.tracking import Tracker

INSTANCES = {"cat": [plain(20)], "dog": [plain(70)]}
CAT, DOG, JOINT = Prompt("a {}", ("cat",)), Prompt("a {}", ("dog",)), Prompt("a {1} and a {2}", ("cat", "dog"))


def untracked(run_id):
    return Tracker()


def test_a_method_differs_only_in_what_trains_and_its_learning_rate(tiny_base):
    params = tiny_params(tiny_base, validation={"prompts": ["a cat"]}, learning_rate=2e-5)
    chosen = comparison.params_of(params, "lora")
    # diffusers' scripts: 1e-5 for Custom Diffusion, 1e-4 for LoRA, 5e-4 for textual inversion
    assert chosen.train.learning_rate == pytest.approx(2e-5 * 1e-4 / 1e-5)
    assert comparison.params_of(params, "textual_inversion").train.learning_rate == pytest.approx(2e-5 * 5e-4 / 1e-5)
    assert comparison.params_of(params, "custom_diffusion").train.learning_rate == 2e-5
    assert comparison.params_of(params, "lora", 0.5).train.learning_rate == 0.5
    assert not chosen.train.validation.prompts
    same = {"method": "custom_diffusion", "learning_rate": 2e-5, "validation": params.train.validation}
    assert chosen.train.model_copy(update=same) == params.train
    assert chosen.model_copy(update={"train": params.train}) == params


def test_a_complete_training_is_not_run_again_and_one_of_other_parameters_is(tiny_base, tmp_path):
    params = tiny_params(tiny_base, max_steps=2)
    prepared = write_prepared(tmp_path / "prepared", params)
    first = comparison.train(params, prepared, tmp_path / "runs", untracked)
    written = (first.path / "metrics.json").stat().st_mtime_ns
    again = comparison.train(params, prepared, tmp_path / "runs", untracked)
    assert (again.path / "metrics.json").stat().st_mtime_ns == written
    facts = comparison.facts_of(again, params)
    learned = adapter.read(again.path / "adapter")
    assert facts["trained_parameters"] == sum(weight.numel() for weight in learned.weights.values()) + 32
    assert facts["learning_rate"] == pytest.approx(1e-3 * 2 * 2), "times the batch, and twice with class images"
    assert facts["seconds"] > 0
    edited = tiny_params(tiny_base, max_steps=3)
    assert comparison.train(edited, prepared, tmp_path / "runs", untracked).path != first.path


def test_each_adapter_is_graded_as_evaluate_grades_it(tiny_base, tmp_path):
    adapters = {
        "joint": random_adapter(tiny_base, tmp_path / "joint", concepts=BOTH, seed=1),
        "alone": random_adapter(tiny_base, tmp_path / "alone", seed=2),
    }
    how = generation(tiny_base)
    graded = comparison.grade(how, adapters, PROMPTS, INSTANCES, Judges(Judge()))
    assert [list(graded[name].summary.concepts) for name in adapters] == [["cat", "dog", "cat+dog"], ["cat"]]
    for name, folder in adapters.items():
        known = [prompt for prompt in PROMPTS if name == "joint" or prompt.concepts == ("cat",)]
        ((_, pairs),) = generate_pairs(how, {name: folder}, known)
        scored = scores.score_prompts(pairs, INSTANCES, Judges(Judge()))
        expected = scores.summarize(scored, len(pairs), resamples=100, seed=42)
        for label, metrics in expected.concepts.items():
            for metric, wanted in metrics.items():
                found = graded[name].summary.concepts[label][metric]
                assert found.to_dict() == pytest.approx(wanted.to_dict(), abs=1e-3)  # base batches differ
        assert graded[name].summary.num_images == len(pairs)
        assert graded[name].facts["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def graded(alignments, colors=None, facts=None):
    """An adapter with the scores (base, adapter) of each prompt, and images of its color."""
    given = [score(prompt, *pair) for prompt, pair in alignments.items()]
    pairs = [
        ImagePair(prompt, prompt.fill(*prompt.concepts), number, plain("red"), plain(colors or "blue"))
        for prompt in alignments
        for number in (0, 1)
    ]
    summary = scores.summarize(
        given,
        len(pairs),
        resamples=100,
        seed=0,
        ceilings={"cat": {"image_alignment": 0.75}, "dog": {"image_alignment": 1.0}},
    )
    return comparison.GradedAdapter(pairs, summary, facts or {"bytes": 2_000_000}, given)


@pytest.fixture
def two():
    """An adapter of cat and dog that was trained here, and one of the cat alone that was not."""
    values = {CAT: ((0.5, 0.25), (0.75, 0.5)), DOG: ((0.5, 0.5), (0.25, 0.75)), JOINT: ((0, 0.25), (0.5, 0.25))}
    facts = {"bytes": 1_500_000, "seconds": 61.4, "trained_parameters": 32, "learning_rate": 1e-4}
    return {
        "joint": graded(values, "blue", facts),
        "alone": graded({CAT: ((0.5, 0.25), (1, 1))}, "lime"),
    }


def test_two_adapters_differ_where_the_interval_of_their_paired_difference_excludes_zero():
    prompts = [Prompt(f"{number} {{}}", ("cat",)) for number in range(4)]
    base = (0.0, 0.0)
    first = graded({prompt: (base, (0.1 * number, 0.2)) for number, prompt in enumerate(prompts)})
    # text alignment is 0.25 higher on every prompt, however much prompts differ; image alignment once up, once down
    images = (0.3, 0.1, 0.3, 0.1)
    second = graded(
        {prompt: (base, (0.1 * i + 0.25, images[i])) for i, prompt in enumerate(prompts)} | {DOG: (base, base)}
    )
    text, image = comparison.differences({"one": first, "two": second}, resamples=200, seed=0)
    assert text == "text alignment: one is lower than two by 0.250 (0.250 to 0.250)."
    assert image.startswith("image alignment: no difference can be told between one and two (-0.")
    back = comparison.differences({"two": second, "one": first}, resamples=200, seed=0)
    assert back[0] == "text alignment: two is higher than one by 0.250 (0.250 to 0.250)."
    alone = graded({DOG: (base, base)})
    assert comparison.differences({"one": first, "alone": alone}, resamples=200, seed=0) == []
    single = comparison.differences({"two": second, "alone": alone}, resamples=200, seed=0)
    assert [sentence.partition(" (")[0] for sentence in single] == [
        f"{name} alignment: two minus alone is +0.000" for name in ("text", "image")
    ]


def test_differences_of_drift_are_of_the_same_prompts_without_the_token():
    other, own = (Prompt(text, ()) for text in ("a car", "a bus")), (Prompt(f"{n} {{}}", ("cat",)) for n in range(2))
    controls = [*other, *own]
    base = (0.0, 0.0)
    one, two = (graded({CAT: (base, base)}) for _ in range(2))
    one.distances.update(zip(controls, np.array([[0.1, 0.2], [0.3, 0.5], [0.4, 0.4], [0.1, 0.1]]), strict=True))
    two.distances.update(zip(controls, np.array([[0.3, 0.4], [0.5, 0.7], [0.5, 0.5], [0.0, 0.0]]), strict=True))
    *_, drift, class_drift = comparison.differences({"one": one, "two": two}, resamples=200, seed=0)
    assert drift == "drift: one is lower than two by 0.200 (0.200 to 0.200)."
    assert class_drift == "class drift: no difference can be told between one and two (-0.100 to +0.100)."


def test_two_adapters_are_compared_by_prompt_and_noise_seed():
    prompts = [Prompt(f"{number} {{}}", ("cat",)) for number in range(3)]
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, (2, 3, 4))

    def of(own):
        given = [
            scores.PromptScore(
                prompt,
                {"identity": 0.0},
                {"identity": row.mean()},
                seeds=({"identity": [0.0] * 4}, {"identity": list(row)}),
            )
            for prompt, row in zip(prompts, own, strict=True)
        ]
        return comparison.GradedAdapter([], scores.summarize(given, 3, resamples=100, seed=0), {}, given)

    (found,) = comparison.differences({"a": of(values[0]), "b": of(values[1])}, resamples=500, seed=3)
    low, high = bootstrap_interval([values[0] - values[1]], resamples=500, seed=3)
    delta = (values[0] - values[1]).mean()
    words = re.findall(r"-?\d\.\d+", found)
    if low <= 0 <= high:
        assert [float(word) for word in words] == pytest.approx([low, high], abs=6e-4)
    else:
        expected = [abs(delta), *sorted((abs(low), abs(high)))]
        assert [float(word) for word in words] == pytest.approx(expected, abs=6e-4)


def test_the_table_has_the_base_model_then_each_adapter_with_its_change(two, tmp_path):
    comparison.write_table(comparison.table(two), tmp_path / "comparison.csv")
    with open(tmp_path / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["adapter"], row["concept"]) for row in rows] == [
        *(("base model", concept) for concept in ("cat", "dog", "cat+dog")),
        *(("joint", concept) for concept in ("cat", "dog", "cat+dog")),
        ("alone", "cat"),
    ]
    base, dog, alone = rows[1], rows[4], rows[6]
    assert (float(base["text_alignment"]), float(base["image_alignment"])) == (0.5, 0.5)
    assert {base[key] for key in ("text_alignment_delta", "image_alignment_delta_low", "seconds", "bytes")} == {""}
    ends = ("", "_delta", "_delta_low", "_delta_high")
    assert [float(dog[f"text_alignment{end}"]) for end in ends] == [0.25, -0.25, -0.25, -0.25]
    assert [float(dog[name]) for name in comparison.FACTS] == [61.4, 1_500_000, 32, 1e-4]
    assert [alone[name] for name in comparison.FACTS] == ["", "2000000", "", ""]
    assert [row["photo_share"] for row in (base, rows[3], dog, rows[5], alone)] == ["", "0.5", "0.5", "", "1.5"]


def test_the_markdown_table_shows_changes_seconds_and_megabytes(two):
    head, rule, *lines = comparison.markdown(comparison.table(two)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(head.split("|")) == len(rule.split("|")) == len(rows[0]) + 2
    assert rows[0] == ["base model", "cat", "0.500", "0.250", "", "", ""]
    assert rows[4] == [
        *("joint", "dog", "0.250 (-0.250, -0.250 to -0.250)", "0.750 (+0.250, +0.250 to +0.250)"),
        *("50 %", "61", "1.500"),
    ]
    assert rows[5][-3] == "", "a prompt of both concepts has no share"
    assert rows[6][-3:] == ["150 %", "", "2.000"]


def test_the_sheet_leaves_white_what_an_adapter_has_not_learned(two):
    pixels = np.asarray(comparison.sheet(two))
    cells = {
        name: (pixels == np.array(color)).all(-1).sum() / 96**2
        for name, color in (("base", (255, 0, 0)), ("joint", (0, 0, 255)), ("alone", (0, 255, 0)))
    }
    assert cells == {"base": 3, "joint": 3, "alone": 1}


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A folder with all that `customdiff compare` reads."""
    monkeypatch.chdir(tmp_path)
    params = tiny_params(tiny_base, max_steps=2)
    write_prepared(tmp_path / "data/prepared", params)
    noisy_images(tmp_path / "data/instances/cat", 2)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {} on red\n")
    values = params.model_dump(mode="json")
    values["evaluate"] |= {"prompts": "prompts", "num_images": 1, "steps": 1, "bootstrap": 100, "masked": False}
    values["tracking"]["enabled"] = False
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(clip.Clip, "load", lambda *_: Judge())
    return tmp_path


def compare(*arguments):
    return CliRunner().invoke(cli.commands, ["compare", *arguments], catch_exceptions=False)


def rows_of(folder):
    with open(folder / "comparison.csv", newline="") as file:
        return {row["adapter"]: row for row in csv.DictReader(file)}


def test_the_command_trains_each_method_grades_and_writes(project):
    done = compare("--methods", "textual_inversion,lora", "--learning-rate", "lora=0.25")
    assert done.exit_code == 0
    rows = rows_of(project / "results/compare")
    assert list(rows) == ["base model", "textual_inversion", "lora"]
    assert float(rows["lora"]["learning_rate"]) == 0.25 * 4
    assert float(rows["textual_inversion"]["learning_rate"]) == pytest.approx(1e-3 * 50 * 2), "without class images"
    assert int(rows["textual_inversion"]["trained_parameters"]) == 32
    assert (project / "results/compare/comparison.jpg").exists()
    assert (project / "results/compare/comparison.md").read_text() in done.output


def test_the_command_grades_adapters_that_exist_and_trains_none(project, tiny_base):
    random_adapter(tiny_base, project / "mine")
    assert compare("mine=mine", "--num-images", "2", "--out", "out").exit_code == 0
    rows = rows_of(project / "out")
    assert list(rows) == ["base model", "mine"]
    assert rows["mine"]["seconds"] == ""
    assert 0 < float(rows["mine"]["class_drift_low"]) <= float(rows["mine"]["class_drift"])
    assert rows["base model"]["class_drift"] == rows["mine"]["drift"] == "", "there is no drift.txt"
    assert not (project / ".comparison").exists()


def test_more_noise_seeds_extend_the_same_images(project, tiny_base):
    random_adapter(tiny_base, project / "mine")
    for seeds in ("1", "3"):
        assert compare("mine=mine", "--seeds", seeds, "--out", f"out{seeds}").exit_code == 0
    kept = sorted(sum(1 for _ in each.iterdir()) for each in (project / ".base-images").iterdir())
    assert kept == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--methods", "dreambooth"], "--methods: .*dreambooth.*custom_diffusion"),
        (["--learning-rate", "dreambooth=1e-4"], "--learning-rate: .*dreambooth.*custom_diffusion"),
        (["--learning-rate", "lora=fast"], "--learning-rate: .*lora.*'fast'"),
        (["--learning-rate", "lora=-1"], "--learning-rate: .*lora.*'-1'"),
        (["--learning-rate", "1e-4"], "--learning-rate: .*'1e-4'"),
        (["models/a"], "NAME=FOLDER: .*'models/a'"),
        (["a=nowhere"], "nowhere/adapter.json"),
        (["--out", "prompts"], "--out: prompts"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(project, arguments, named):
    with pytest.raises(UserError, match=named) as error:
        compare(*arguments)
    assert "\n" not in str(error.value)
    assert (project / "prompts/default.txt").exists()
    assert not (project / "results").exists()
    assert not (project / ".comparison").exists()
