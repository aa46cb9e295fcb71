"""A sweep draws what evaluate draws, checkpoint after checkpoint in one pipeline; its pictures show its tables."""

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from conftest import concept_values, tiny_params, write_prepared
from PIL import Image
from typer.testing import CliRunner

from customdiff import cli, tracking
from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.evaluation import scores, sweep
from customdiff.evaluation.scores import FIGURES, Prompt
from customdiff.evaluation.sweep import HOLDOUT, Point
from customdiff.models import base, clip, methods, modifier_tokens
from customdiff.training import checkpoints, trainer


def learned(folder, path, seed, method="custom_diffusion", tokens_of=("<new1>",)):
    """An adapter of random weights for the base model at `folder`, written to `path`."""
    pipe = base.load_pipeline(tiny_params(folder).base)
    torch.manual_seed(seed)
    rows = {
        token: {name: torch.randn_like(row) for name, row in modifier_tokens.initial_embedding(pipe, "cat").items()}
        for token in tokens_of
    }
    modifier_tokens.add_tokens(pipe, rows)
    how = {"method": method, "freeze_model": "crossattn_kv", "lora_rank": 2}
    with torch.no_grad():
        for weight in methods.inject(pipe.unet, adapter_config).values():
            weight += 0.3 * torch.randn_like(weight)
    concepts = {token.strip("<>"): concept_values(token) for token in tokens_of}
    config = {"base": tiny_params(folder).base.model_dump(), "concepts": concepts, **how}
    adapter.save(adapter.from_pipeline(pipe, AdapterConfig.model_validate(config)), path)
    return path


def drawn(pipe):
    """(32, 32, 3) float, before rounding to bytes."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a <new1> cat", num_inference_steps=2, generator=generator, output_type="np").images[0]


@pytest.mark.parametrize(
    ("model", "method"), [*(("tiny_base", method) for method in methods.METHODS), ("tiny_xl_base", "custom_diffusion")]
)
def test_an_adapter_put_in_anothers_place_draws_as_in_a_fresh_pipeline(request, tmp_path, model, method):
    folder = request.getfixturevalue(model)
    one, two = (adapter.read(learned(folder, tmp_path / str(seed), seed, method)) for seed in (1, 2))
    pipe = base.load_pipeline(tiny_params(folder).base)
    adapter.inject(pipe, one)
    first = drawn(pipe)
    sweep.replace(pipe, two)
    fresh = base.load_pipeline(tiny_params(folder).base)
    adapter.inject(fresh, two)
    np.testing.assert_array_equal(drawn(pipe), drawn(fresh))
    assert np.abs(drawn(pipe) - first).max() > 0.001
    sweep.replace(pipe, one)
    np.testing.assert_array_equal(drawn(pipe), first)


@pytest.mark.parametrize("other", [{"method": "lora"}, {"tokens_of": ("<new1>", "<new2>")}, {"tokens_of": ("<new3>",)}])
def test_a_checkpoint_of_another_training_is_refused(tiny_base, tmp_path, other):
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    adapter.load(pipe, learned(tiny_base, tmp_path / "one", 1))
    with pytest.raises(UserError, match="of different trainings"):
        sweep.replace(pipe, adapter.read(learned(tiny_base, tmp_path / "two", 2, **other)))


@pytest.mark.parametrize("trouble", ["another base", "damaged"])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_drawn(
    tiny_base, tiny_v_base, tmp_path, monkeypatch, trouble
):
    folders = {
        1: learned(tiny_base, tmp_path / "one", 1),
        2: learned(tiny_v_base if trouble == "another base" else tiny_base, tmp_path / "two", 2),
    }
    if trouble == "damaged":
        (folders[2] / "<new1>.safetensors").unlink()
    asked = []
    monkeypatch.setattr(scores, "generate", lambda *arguments, **options: asked.append(arguments))
    params = tiny_params(tiny_base)
    with pytest.raises(UserError, match=r"of another base model|incomplete adapter"):
        sweep.sweep(base.load_pipeline(params.base), folders, params, PROMPTS, INSTANCES, Judge())
    assert not asked


class Judge:
    """Embeds an image by its mean colour, a text by its length."""

    def images(self, images):
        return self.unit([np.asarray(image.convert("RGB"), float).mean((0, 1)) for image in images])

    def text(self, texts):
        return self.unit([[len(text), 10.0, 3.0] for text in texts])

    def unit(self, rows):
        return (np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def plain(color):
    return Image.new("RGB", (8, 8), color)


PROMPTS = {"cat": [Prompt("a {} on red", "scene"), Prompt("the {}", "style"), Prompt("a very small {}", "property")]}
INSTANCES = {"cat": [plain((200, 40, 40)), plain((180, 60, 20))]}


def test_every_checkpoint_is_drawn_and_graded_as_evaluate_does_and_the_base_model_once(
    tiny_base, tmp_path, monkeypatch
):
    params = tiny_params(tiny_base)
    settings = params.evaluate.model_copy(update={"steps": 2, "num_images": 2})
    params = params.model_copy(update={"evaluate": settings})
    folders = {50: learned(tiny_base, tmp_path / "one", 1), 100: learned(tiny_base, tmp_path / "two", 2)}
    expected = []
    for folder in folders.values():
        fresh = base.load_pipeline(params.base)
        pairs = scores.draw(fresh, lambda pipe, folder=folder: adapter.load(pipe, folder), params, PROMPTS)
        expected.append((pairs, scores.score(pairs, INSTANCES, Judge())))

    asked, generate = [], scores.generate
    monkeypatch.setattr(
        scores, "generate", lambda pipe, *a, **o: asked.append(o["progress"]) or generate(pipe, *a, **o)
    )
    kept = {"cat": [plain((10, 90, 250))]}
    pipe = base.load_pipeline(params.base)
    points = sweep.sweep(pipe, folders, params, PROMPTS, INSTANCES, Judge(), kept)

    assert asked == ["base model", "step 50 (1 of 2)", "step 100 (2 of 2)"]
    assert [point.step for point in points] == [0, 50, 100]
    for point, (pairs, rows) in zip(points[1:], expected, strict=True):
        shown = [pair.customized for pair in pairs if pair.number == 0]
        assert [image.tobytes() for image in point.images] == [image.tobytes() for image in shown]
        for row, wanted in zip(point.rows, rows, strict=True):
            assert {name: row[name] for name in wanted} == wanted
    pairs, rows = expected[0]
    assert [image.tobytes() for image in points[0].images] == [p.base.tobytes() for p in pairs if p.number == 0]
    assert [row["text_alignment"] for row in points[0].rows] == [row["base_text_alignment"] for row in rows]
    blue = np.array([10, 90, 250]) / np.linalg.norm([10, 90, 250])
    for point, side in ((points[0], "base"), (points[1], "customized")):
        first = [getattr(pair, side) for pair in pairs[:2]]
        cosines = [image @ blue for image in Judge().images(first).astype(float)]
        assert point.rows[0][HOLDOUT] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert points[1].rows[0]["prompt"] == "a {} on red"


def row(concept, text, image, **more):
    return {"concept": concept, "prompt": "a {} there", "kind": "scene", "text_alignment": text} | {
        "image_alignment": image,
        **more,
    }


def test_figures_are_means_over_concepts_with_intervals_over_prompts():
    rows = [row("cat", 1.0, 0.2), row("cat", 2.0, 0.2), row("pot", 3.0, 0.8)]
    rows.append(row("cat and pot", 9.0, 9.0))  # a prompt of both in one picture is no part of the mean, as in evaluate
    found = sweep.figures(Point(50, rows, []), resamples=4000, seed=0)
    assert found["text_alignment"] == pytest.approx((1.5 + 3) / 2)
    # two prompts, resampled with replacement: their mean is 1, 1.5 or 2; the other concept's only prompt stays
    assert (found["text_alignment_low"], found["text_alignment_high"]) == pytest.approx((2, 2.5))
    assert [found[f"image_alignment{end}"] for end in ("", "_low", "_high")] == pytest.approx([0.5] * 3)
    assert set(found) == {"step", *(f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high"))}


def points_of(colors, concepts=("cat",)):
    rows = [row(concept, 1.0, 0.5) for concept in concepts]
    return [Point(50 * place, rows, [plain(color)] * len(rows)) for place, color in enumerate(colors)]


def table_of(points):
    rng = np.random.default_rng(0)
    table = []
    for point in points:
        line = {"step": point.step}
        for name in FIGURES:
            low, middle, high = sorted(rng.uniform(size=3))
            line |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        table.append(line)
    return table


def test_tables_are_read_back_as_they_were(tmp_path):
    points = points_of([(1, 2, 3)] * 3)
    table = table_of(points)
    table[1] |= {"text_alignment_delta": 0.25}
    sweep.write_tables(points, table, tmp_path)
    lines = list(csv.DictReader((tmp_path / "sweep.csv").open(newline="")))
    assert [line["step"] for line in lines] == ["0", "50", "100"]
    assert float(lines[2]["image_alignment_low"]) == pytest.approx(table[2]["image_alignment_low"], abs=1e-6)
    assert [line["text_alignment_delta"] for line in lines] == ["", "0.250000", ""]
    prompts = list(csv.DictReader((tmp_path / "per_prompt.csv").open(newline="")))
    assert [(line["step"], line["prompt"]) for line in prompts] == [(str(step), "a {} there") for step in (0, 50, 100)]


def test_the_picture_has_each_model_at_its_figures_with_its_interval_and_its_step():
    points = points_of([(0, 0, 0)] * 4)
    table = table_of(points)
    plane, text, image = sweep.picture(points, table, photos=0.7).axes[:3]
    x, y = FIGURES
    spots = [drawn.get_offsets()[0] for drawn in plane.collections if hasattr(drawn, "get_sizes")]
    assert [tuple(spot) for spot in spots] == [(line[x], line[y]) for line in table]
    lines = [drawn for drawn in plane.collections if hasattr(drawn, "get_segments")]
    crosses = {tuple(segment.ravel()) for drawn in lines for segment in drawn.get_segments()}
    for line in table:
        assert (line[f"{x}_low"], line[y], line[f"{x}_high"], line[y]) in crosses
        assert (line[x], line[f"{y}_low"], line[x], line[f"{y}_high"]) in crosses
    labels = {words.get_text(): tuple(words.xy) for words in plane.texts}
    assert labels == {str(line["step"] or "base model"): (line[x], line[y]) for line in table}
    assert [list(line.get_ydata()) for line in plane.lines if line.get_label() == "holdout photos"] == [[0.7, 0.7]]
    for panel, name in ((text, x), (image, y)):
        curve, level = panel.lines[:2]
        assert list(curve.get_xdata()) == [50, 100, 150]
        assert list(curve.get_ydata()) == [line[name] for line in table[1:]]
        assert set(level.get_ydata()) == {table[0][name]}


def test_without_holdout_photos_no_line_is_drawn_for_them():
    points = points_of([(0, 0, 0)] * 2)
    plane = sweep.picture(points, table_of(points)).axes[0]
    assert "holdout photos" not in {line.get_label() for line in plane.lines}


def test_labels_keep_off_one_another_and_off_the_points_where_these_lie_together():
    spots = np.random.default_rng(0).normal(size=(12, 2)) * 10
    labels = ["base model", *(str(50 * number) for number in range(1, 12))]
    middles = spots + sweep.label_offsets(spots, labels)
    halves = [2.6 * len(label) for label in labels]
    for one in range(12):
        for other in range(12):
            apart = np.abs(middles[one] - middles[other])
            assert one == other or apart[0] > halves[one] + halves[other] or apart[1] > 9
            off = np.abs(middles[one] - spots[other])
            assert off[0] > halves[one] or off[1] > 4
    far = np.array([[0.0, 0.0], [300.0, 0.0]])
    assert np.linalg.norm(sweep.label_offsets(far, ["50", "100"]), axis=1) == pytest.approx([14, 14])


def test_the_strip_below_shows_one_prompt_of_each_concept_a_column_a_step():
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    points = points_of(colors, ("cat", "cat", "pot"))
    strip = sweep.picture(points, table_of(points)).axes[3:]
    shown = [axes.images[0].get_array()[0, 0].tolist() for axes in strip]
    assert shown == [list(color) for color in colors] * 2
    assert [axes.get_title() for axes in strip[:3]] == ["base model", "50", "100"]
    assert [axes.texts[0].get_text() for axes in strip[::3]] == ["a cat there", "a pot there"]


def test_the_sheet_shows_every_prompt_at_every_step():
    colors = [(250, 0, 0), (0, 250, 0)]
    pixels = np.asarray(sweep.sheet(points_of(colors, ("cat", "pot"))))
    boxes = []
    for color in colors:
        ys, xs = np.nonzero((pixels == color).all(-1))
        assert len(ys) == 2 * (xs.max() + 1 - xs.min()) ** 2, "two prompts alike, of two concepts: two squares"
        boxes.append((xs.min(), xs.max()))
    assert boxes[0][1] < boxes[1][0]


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A folder to train in: a call trains six steps, with a checkpoint every second one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = tiny_params(tiny_base)
    settings = params.model_dump() | {"evaluate": {"steps": 2, "num_images": 1, "bootstrap": 100}}
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "data/prompts/cat.txt").write_text("scene: a {} on red\nstyle: the {}\n")
    for folder, color in (("instances", (200, 40, 40)), ("holdout", (180, 50, 40))):
        (tmp_path / "data" / folder / "cat").mkdir(parents=True)
        plain(color).save(tmp_path / "data" / folder / "cat/1.png")
    write_prepared(tmp_path / "prepared", params)
    monkeypatch.setattr(clip.Clip, "load", lambda *arguments: Judge())

    def finished(tracked=False):
        chosen = Params.model_validate(settings | {"tracking": {"enabled": tracked}})
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(chosen.model_dump()))
        return trainer.run(chosen, tmp_path / "prepared", checkpoints.RUNS, lambda run_id: tracking.start(chosen))

    return finished


def run(*arguments):
    result = CliRunner().invoke(cli.commands, ["sweep", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_sweep_of_a_finished_training_joins_its_run(project, tmp_path):
    from mlflow import MlflowClient

    training_run = project(tracked=True)
    output = run("--num-images", "2")
    assert f"{training_run.path}: steps 2, 4, 6" in output
    out = tmp_path / "results/sweep"
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "sweep.csv", "per_prompt.csv", "trade_off.png", "prompts.jpg")
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert (list(metrics["steps"]), metrics["num_prompts"], metrics["num_images"]) == (["2", "4", "6"], 2, 4)
    photos = [Judge().images([plain(color)])[0] for color in ((200, 40, 40), (180, 50, 40))]
    assert metrics["holdout_photos"] == pytest.approx(float(photos[0] @ photos[1]), abs=1e-6)

    client = MlflowClient(f"sqlite:///{tmp_path / tracking.DATABASE}")
    history = client.get_metric_history(training_run.run_id(), "sweep/image_alignment")
    logged = {(point.step, round(point.value, 6)) for point in history}
    assert logged == {(int(step), figures["image_alignment"]) for step, figures in metrics["steps"].items()}
    assert "sweep/trade_off.png" in {file.path for file in client.list_artifacts(training_run.run_id(), "sweep")}
    experiment = client.get_experiment_by_name("customdiff").experiment_id
    assert [found.info.run_id for found in client.search_runs([experiment])] == [training_run.run_id()]
    assert client.get_run(training_run.run_id()).info.status == "FINISHED"


def test_what_the_base_model_drew_is_not_drawn_again(project, tmp_path, monkeypatch):
    project()
    drawn, take = [], scores.take

    def noted(*arguments):
        drawn.append(arguments[-1])
        return take(*arguments)

    monkeypatch.setattr(scores, "take", noted)
    run("--steps", "2", "--num-images", "1")
    first = (tmp_path / "results/sweep/per_prompt.csv").read_bytes()
    run("--steps", "2", "--num-images", "1")
    assert drawn == ["base model", "step 2 (1 of 1)", "step 2 (1 of 1)"]
    assert (tmp_path / "results/sweep/per_prompt.csv").read_bytes() == first


def test_what_is_wrong_with_a_sweep_is_one_line_and_leaves_no_results(project, tmp_path):
    project()
    for arguments, message in (
        (["--steps", "2,7"], "has no checkpoint of step 7; it has 2, 4, 6"),
        (["--steps", "2;4"], "--steps: must be numbers with commas between"),
        (["--run", "nowhere"], "nowhere: is no run with checkpoints"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run(*arguments)
        assert "\n" not in str(error.value)
    edited = (tmp_path / "params.yaml").read_text().replace("<new1>", "<new2>")
    (tmp_path / "params.yaml").write_text(edited)
    with pytest.raises(UserError, match=r"concepts\.cat: the adapter has not learned it as <new2>"):
        run()
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_a_finished_training_stay_until_the_next_begins(project, tmp_path, tiny_base):
    finished = project()
    assert checkpoints.find_run() == finished
    assert [checkpoints.step_of(path) for path in checkpoints.find_run().checkpoints()] == [2, 4, 6]
    edited = tiny_params(tiny_base, learning_rate=2e-3, max_steps=1)
    following = trainer.run(edited, tmp_path / "prepared", checkpoints.RUNS, lambda run_id: tracking.Tracker())
    assert [found.path for found in checkpoints.find_runs()] == [following.path]
    with pytest.raises(UserError, match="no checkpoint of step 2; it has 1"):
        checkpoints.find("2")


def test_a_prompt_of_several_concepts_is_titled_with_their_names():
    assert sweep._words({"prompt": "a {2} on a {1}", "concept": "cat and pot"}) == "a pot on a cat"
    assert sweep._words({"prompt": "a {} on red", "concept": "cat"}) == "a cat on red"
