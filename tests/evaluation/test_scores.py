"""The stage's parts: prompts as they are written, base before adapter, figures as numpy computes them."""

import csv
import json
import os
import runpy

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Base, Params
from customdiff.errors import UserError
from customdiff.evaluation import base_image_cache, scores
from customdiff.evaluation.scores import COLUMNS, Pair, Prompt, read_prompts
from customdiff.models import attention, clip, modifier_tokens
from customdiff.models import base as base_model
from customdiff.models.sampling import image_seed


def params(**evaluate):
    concepts = {
        name: {
            "source": {"path": "x"},
            "modifier_token": token,
            "class_prompt": noun,
            "instance_prompt": f"photo of a {{}} {noun}",
        }
        for name, token, noun in (("tom", "<new1>", "cat"), ("pot", "<new2>", "wooden pot"))
    }
    return Params.model_validate({"concepts": concepts, "evaluate": {"num_images": 2, "steps": 2, **evaluate}})


def test_prompts_have_a_kind_or_none_and_comments_go(tmp_path):
    (tmp_path / "wooden_pot.txt").write_text(
        "# ours\n\nscene: a {} on the grass # like this\na {}: a study\nstyle:{}\nscene: a {} on the grass\n"
    )
    assert read_prompts(tmp_path, "wooden pot") == [
        Prompt("a {} on the grass", "scene"),
        Prompt("a {}: a study", "other"),
        Prompt("{}", "style"),
    ]


def test_a_class_without_a_file_takes_the_default(tmp_path):
    (tmp_path / "default.txt").write_text("a {}\n")
    assert read_prompts(tmp_path, "dog") == [Prompt("a {}")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"^evaluate\.prompts: neither cat\.txt nor default\.txt"),
        ("# nothing\n", "holds no prompt"),
        ("a {}\n\nscene: a cat\n", r"cat\.txt: line 3: lacks \{\}.*'scene: a cat'"),
    ],
)
def test_what_is_wrong_with_prompts_is_said_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "cat.txt").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path, "cat")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("folder", "missing"),
    [("data/prompts", {"companion"}), ("data/prompts/sd", set())],  # the embedded base cannot draw two subjects yet
)
def test_our_own_prompt_files_hold_every_kind(folder, missing, pytestconfig):
    files = sorted((pytestconfig.rootpath / folder).glob("*.txt"))
    assert len(scores.read_together(pytestconfig.rootpath / folder, 2)) == 6
    files.remove(pytestconfig.rootpath / folder / "together.txt")
    assert "default" in {file.stem for file in files}
    for file in files:
        prompts = read_prompts(file.parent, file.stem)
        assert {prompt.kind for prompt in prompts} == set(scores.KINDS) - missing, file
        assert len(prompts) >= 12, file
        assert all(prompt.template.count("{}") == 1 for prompt in prompts)


def test_an_adapter_of_other_concepts_or_tokens_is_refused():
    def learned(**tokens: str) -> AdapterConfig:
        concepts = {name: {"modifier_token": token} for name, token in tokens.items()}
        return AdapterConfig.model_validate({"base": {"model": "data/base"}, "concepts": concepts})

    scores.check_concepts(learned(tom="<new1>", pot="<new2>"), params())
    with pytest.raises(UserError, match=r"^concepts\.pot: .* not learned it as <new2>"):
        scores.check_concepts(learned(tom="<new1>", pot="<new3>"), params())
    with pytest.raises(UserError, match=r"^concepts\.tom"):
        scores.check_concepts(learned(pot="<new2>"), params())


class Recorder:
    """A pipeline's stand-in at the level of `generate`: remembers what it is asked, and draws its seed."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.customized = False
        monkeypatch.setattr(scores, "generate", self.generate)

    def generate(self, pipe, prompts, seeds, **options):
        self.calls.append((self.customized, list(prompts), list(seeds), options))
        return [Image.new("RGB", (8, 8), (seed % 256, 0, 255 * self.customized)) for seed in seeds]

    def customize(self, pipe):
        self.customized = True


def test_base_and_adapter_draw_the_same_prompts_and_seeds_one_without_the_token(monkeypatch):
    recorder = Recorder(monkeypatch)
    prompts = {"tom": [Prompt("a {} on the grass", "scene")], "pot": [Prompt("a photo of {}")]}
    pairs = scores.draw(None, recorder.customize, params(guidance_scale=3, eta=0.5), prompts)
    (was_customized, base, base_seeds, options), (is_customized, custom, custom_seeds, _) = recorder.calls
    assert (was_customized, is_customized) == (False, True)
    assert base == ["a cat on the grass"] * 2 + ["a photo of wooden pot"] * 2
    assert custom == ["a <new1> cat on the grass"] * 2 + ["a photo of <new2> wooden pot"] * 2
    assert base_seeds == custom_seeds
    assert len(set(base_seeds)) == 4
    assert base_seeds[1] == image_seed(42, "tom", "a {} on the grass", 1)
    assert (options["guidance_scale"], options["eta"], options["steps"]) == (3, 0.5, 2)
    assert [pair.text for pair in pairs] == base
    assert [(pair.concept, pair.number) for pair in pairs] == [("tom", 0), ("tom", 1), ("pot", 0), ("pot", 1)]
    assert all(pair.base.getpixel((0, 0))[2] == 0 and pair.customized.getpixel((0, 0))[2] == 255 for pair in pairs)


def test_prompts_of_two_concepts_show_both_words_and_are_graded_without_either(monkeypatch, tmp_path):
    recorder = Recorder(monkeypatch)
    (tmp_path / "default.txt").write_text("a {}\n")
    (tmp_path / "together.txt").write_text("scene: a {2} on a {1}\na {1}, a {2} and a {3}\n")
    settings = params(prompts=str(tmp_path), num_images=1)
    prompts = scores.all_prompts(settings)
    assert prompts["tom and pot"] == [Prompt("a {2} on a {1}", "scene")], "the other line is of three concepts"
    pairs = scores.draw(None, recorder.customize, settings, prompts)
    (_, base, _, _), (_, custom, _, _) = recorder.calls
    assert base == ["a cat", "a wooden pot", "a wooden pot on a cat"]
    assert custom == ["a <new1> cat", "a <new2> wooden pot", "a <new2> wooden pot on a <new1> cat"]
    assert pairs[-1].text == "a wooden pot on a cat"
    one = settings.model_copy(update={"concepts": {"tom": settings.concepts["tom"]}})
    assert set(scores.all_prompts(one)) == {"tom"}
    (tmp_path / "together.txt").write_text("a {1}\n")
    with pytest.raises(UserError, match=r"together\.txt: line 1: lacks \{2\}"):
        scores.all_prompts(settings)


class Judge:
    """Embeds an image by the angle that its red channel names, in degrees, and a text by the number it holds."""

    def images(self, images):
        return self.at([image.getpixel((0, 0))[0] for image in images])

    def text(self, texts):
        return self.at([float(text) for text in texts])

    def at(self, degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def red(degrees):
    return Image.new("RGB", (4, 4), (degrees, 0, 0))


def pair(concept, template, text, number, base, customized):
    return Pair(concept, Prompt(template), text, number, red(base), red(customized))


PAIRS = [
    pair("tom", "a {}", "0", 0, 60, 0),
    pair("tom", "a {}", "0", 1, 90, 60),
    pair("tom", "b {}", "90", 0, 30, 90),
    pair("pot", "a {}", "30", 0, 90, 30),
]
INSTANCES = {"tom": [red(0), red(60)], "pot": [red(30)]}


def test_figures_of_a_prompt_are_means_over_its_images():
    rows = scores.score(PAIRS, INSTANCES, Judge())
    cos = lambda degrees: np.cos(np.radians(degrees))  # noqa: E731
    assert [(row["concept"], row["prompt"]) for row in rows] == [("tom", "a {}"), ("tom", "b {}"), ("pot", "a {}")]
    first = rows[0]
    assert first["base_text_alignment"] == pytest.approx(2.5 * (0.5 + 0) / 2, abs=1e-6)
    assert first["text_alignment"] == pytest.approx(2.5 * (1 + 0.5) / 2, abs=1e-6)
    assert first["image_alignment"] == pytest.approx(((1 + 0.5) / 2 + (0.5 + 1) / 2) / 2, abs=1e-6)
    assert first["base_image_alignment"] == pytest.approx(((0.5 + 1) / 2 + (0 + cos(30)) / 2) / 2, abs=1e-6)
    assert first["image_alignment_delta"] == pytest.approx(first["image_alignment"] - first["base_image_alignment"])
    assert rows[2]["image_alignment"] == pytest.approx(1, abs=1e-6), "each concept has instance images of its own"
    assert set(rows[0]) == set(COLUMNS)


def test_the_summary_is_the_mean_over_concepts_with_intervals_that_hold_it():
    rows = scores.score(PAIRS, INSTANCES, Judge())
    summary = scores.summarize(rows, resamples=500, seed=0)
    by_hand = ((rows[0]["text_alignment"] + rows[1]["text_alignment"]) / 2 + rows[2]["text_alignment"]) / 2
    assert summary["text_alignment"] == pytest.approx(by_hand, abs=1e-6)
    for figures in (summary, *summary["concepts"].values()):
        for name in scores.FIGURES:
            delta = figures[f"{name}_delta"]
            assert delta == pytest.approx(figures[name] - figures[f"base_{name}"], abs=2e-6)
            low, high = figures[f"{name}_delta_ci95"]
            assert low <= delta + 1e-6
            assert high >= delta - 1e-6
    # one prompt only: every resample is that prompt
    assert (
        summary["concepts"]["pot"]["image_alignment_delta_ci95"]
        == [summary["concepts"]["pot"]["image_alignment_delta"]] * 2
    )
    assert set(summary["concepts"]) == {"tom", "pot"}


def test_two_concepts_in_one_picture_are_aligned_to_both_and_counted_apart():
    both = pair("tom and pot", "a {1} and a {2}", "0", 0, 90, 30)
    rows = scores.score([*PAIRS, both], INSTANCES, Judge())
    to_tom, to_pot = (np.cos(np.radians([30, 30])).mean(), 1.0)
    assert rows[-1]["image_alignment"] == pytest.approx((to_tom + to_pot) / 2, abs=1e-6)
    summary = scores.summarize(rows, resamples=200, seed=0)
    alone = scores.summarize(rows[:-1], resamples=200, seed=0)
    assert summary["concepts"]["tom and pot"]["image_alignment"] == pytest.approx((to_tom + to_pot) / 2, abs=1e-6)
    assert summary["image_alignment"] == alone["image_alignment"]


def test_the_table_is_read_back_as_it_was(tmp_path):
    rows = scores.score(PAIRS, INSTANCES, Judge())
    scores.write_table(rows, tmp_path / "per_prompt.csv")
    with open(tmp_path / "per_prompt.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [row["prompt"] for row in table] == ["a {}", "b {}", "a {}"]
    assert float(table[0]["text_alignment"]) == pytest.approx(rows[0]["text_alignment"], abs=1e-6)


def test_every_image_is_written_once_for_base_and_customized(tmp_path):
    alike = [pair("tom", "a {}!", "0", 0, 10, 20), pair("tom", "a {}?", "0", 0, 30, 40)]
    scores.write_images([*PAIRS, *alike], tmp_path)
    for kind in ("base", "customized"):
        assert len(list((tmp_path / kind).rglob("*.png"))) == 6
    assert np.asarray(Image.open(tmp_path / "customized/tom/01-a-1.png"))[0, 0, 0] == 60


def test_instances_are_read_in_order_and_none_is_an_error(tmp_path):
    red(9).save(tmp_path / "b.png")
    red(3).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [image.getpixel((0, 0))[0] for image in scores.read_instances(tmp_path)] == [3, 9]
    with pytest.raises(UserError, match="holds no images"):
        scores.read_instances(tmp_path / "absent")


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch, pytestconfig):
    """A project folder with all that the stage reads: adapter, instance images, prompts, params.yaml."""
    monkeypatch.chdir(tmp_path)
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    torch.manual_seed(0)
    modifier_tokens.add_tokens(pipe, {"<new1>": {"text_encoder": torch.randn(pipe.text_encoder.config.hidden_size)}})
    for weight in attention.inject_processors(pipe.unet, "crossattn_kv").values():
        weight.data.normal_()
    concept = {"modifier_token": "<new1>", "class_prompt": "cat", "instance_prompt": "photo of a {} cat"}
    how = {"method": "custom_diffusion", "freeze_model": "crossattn_kv"}
    adapter_values = {"base": {"model": str(tiny_base)}, "concepts": {"tom": concept}, **how}
    adapter.save(adapter.from_pipeline(pipe, AdapterConfig.model_validate(adapter_values)), "models/adapter")
    (tmp_path / "data/instances/tom").mkdir(parents=True)
    red(30).save(tmp_path / "data/instances/tom/1.png")
    (tmp_path / "data/prompts").mkdir()
    (tmp_path / "data/prompts/cat.txt").write_text("scene: a {} on the grass\nstyle: a red {}\n")
    settings = {
        "base": {"model": str(tiny_base), "device": "cpu"},
        "concepts": {"tom": {**concept, "source": {"path": "x"}}},
        "evaluate": {"steps": 2, "num_images": 2, "bootstrap": 100},
        "tracking": {"enabled": False},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    stub = Judge()
    stub.text = lambda texts: stub.at([10.0 * len(text) for text in texts])
    monkeypatch.setattr(clip.Clip, "load", lambda *arguments, **options: stub)
    return lambda: runpy.run_path(str(pytestconfig.rootpath / "stages/evaluate.py"), run_name="__main__")


def test_the_stage_writes_all_of_its_results_twice_the_same(project, tmp_path):
    project()
    results = tmp_path / "results/evaluate"
    files = {path.name for path in results.iterdir()}
    assert files == {"metrics.json", "per_prompt.csv", "contact_sheet.jpg", "report.html", "images"}
    metrics = json.loads((results / "metrics.json").read_text())
    figures = {f"{prefix}{name}" for prefix in ("", "base_") for name in scores.FIGURES}
    figures |= {f"{name}_delta{suffix}" for name in scores.FIGURES for suffix in ("", "_ci95")}
    assert set(metrics) == {*figures, "concepts", "seconds", "num_prompts", "num_images"}
    assert set(metrics["concepts"]["tom"]) == figures
    assert (metrics["num_prompts"], metrics["num_images"]) == (2, 4)
    first = {path.relative_to(results): path.read_bytes() for path in results.rglob("*.png")}
    assert len(first) == 8
    names = {path.relative_to(results / "images/base") for path in (results / "images/base").rglob("*.png")}
    for name in names:
        assert first["images/base" / name] != first["images/customized" / name], "the adapter must change the image"
    project()
    assert {path.relative_to(results): path.read_bytes() for path in results.rglob("*.png")} == first
    del metrics["seconds"]
    assert json.loads((results / "metrics.json").read_text()).items() >= metrics.items()


def test_a_stage_that_fails_leaves_the_results_that_were_there(project, tmp_path, capsys):
    kept = tmp_path / "results/evaluate/metrics.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("old")
    (tmp_path / "data/prompts/cat.txt").write_text("a cat\n")
    with pytest.raises(SystemExit) as stop:
        project()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: data/prompts/cat.txt: line 1: lacks {}")
    assert kept.read_text() == "old"


def test_what_the_base_model_drew_is_kept_for_the_next_training(tiny_base, tmp_path):
    """The pictures are the same bits; whatever shapes them makes new ones."""
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    calls = []

    def evaluate(texts=("a cat", "a dog"), seeds=(1, 2), **changes):
        settings = params(**changes)

        def drawing():
            calls.append(texts)
            return [Image.fromarray(np.full((8, 8, 3), seed, np.uint8)) for seed in seeds]

        images = base_image_cache.base_images(tmp_path / "drawn", pipe, settings, texts, seeds, drawing)
        return [np.asarray(image).tolist() for image in images]

    first = evaluate()
    assert evaluate() == first
    assert len(calls) == 1
    evaluate(seeds=(1, 3))
    evaluate(texts=("a cat", "a car"))
    evaluate(steps=3)
    with torch.no_grad():
        next(layer for layer in pipe.unet.modules() if getattr(layer, "is_cross_attention", False)).to_k.weight += 1
    evaluate()
    assert len(calls) == 5


def test_only_what_was_used_last_is_kept(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(base_image_cache, "SETS", 2)
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    calls = []

    def evaluate(seed):
        def drawing():
            calls.append(seed)
            return [Image.new("RGB", (8, 8))]

        base_image_cache.base_images(tmp_path / "drawn", pipe, params(), ["a cat"], [seed], drawing)
        for folder in (tmp_path / "drawn").iterdir():  # a second passes
            os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - 1))

    for seed in (1, 2, 1, 3, 1, 2):
        evaluate(seed)
    assert calls == [1, 2, 3, 2]
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_two_experiments_may_draw_the_same_at_once(tiny_base, tmp_path):
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))
    images = [Image.new("RGB", (8, 8), "red")]

    def evaluate(draw):
        found = base_image_cache.base_images(tmp_path / "drawn", pipe, params(), ["a cat"], [1], draw)
        return [np.asarray(image).tolist() for image in found]

    def while_another_does():
        evaluate(lambda: images)
        return images

    first = evaluate(while_another_does)
    assert evaluate(lambda: pytest.fail("drawn again")) == first
    assert len(list((tmp_path / "drawn").iterdir())) == 1


def test_queued_experiments_share_the_projects_pictures(monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert base_image_cache.drawn_folder() == tmp_path / ".drawn"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    assert base_image_cache.drawn_folder() == tmp_path / "project" / ".drawn"


def test_a_drawing_that_fails_keeps_nothing(tiny_base, tmp_path):
    pipe = base_model.load_pipeline(Base(model=str(tiny_base)))

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base_image_cache.base_images(tmp_path / "drawn", pipe, params(), ["a cat"], [1], stopped)
    assert not (tmp_path / "drawn").exists()
