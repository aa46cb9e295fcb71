"""A sweep grades every checkpoint as evaluate would; its tables, sheet and MLflow run hold what was computed."""

import csv
import json

import numpy as np
import pytest
import yaml
from conftest import random_adapter, tiny_params, write_prepared
from stand_ins import BOTH, PROMPTS, Judge, generation, plain
from typer.testing import CliRunner

from customdiff import cli, tracking
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.evaluation import drift, scores, sweep
from customdiff.evaluation.generation import generate_pairs
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import bootstrap_interval
from customdiff.evaluation.prompts import Prompt
from customdiff.evaluation.report import PLANE as METRICS
from customdiff.evaluation.scores import HOLDOUT, metrics_of
from customdiff.evaluation.sweep import Point
from customdiff.models import clip
from customdiff.training import checkpoints, trainer

INSTANCES = {"cat": [plain(20), plain(40)], "dog": [plain(70)]}
HOLDOUT_PHOTOS = {"cat": [plain(30)], "dog": [plain(100)]}


def pixels(images):
    return [image.tobytes() for image in images]


def test_each_checkpoint_is_graded_as_evaluate_grades_it_and_the_base_model_comes_first(tiny_base, tmp_path):
    how = generation(tiny_base)
    folders = {step: random_adapter(tiny_base, tmp_path / str(step), concepts=BOTH, seed=step) for step in (50, 100)}
    points = sweep.sweep(how, folders, PROMPTS, INSTANCES, Judges(Judge()), HOLDOUT_PHOTOS)
    assert [(point.step, point.title) for point in points] == [(0, "base model"), (50, "50"), (100, "100")]
    for point in points[1:]:
        ((_, pairs),) = generate_pairs(how, {"alone": folders[point.step]}, PROMPTS)
        scored = scores.score_prompts(pairs, INSTANCES, Judges(Judge()), HOLDOUT_PHOTOS)
        assert point.prompts == PROMPTS
        assert pixels(point.images) == pixels(pair.customized for pair in pairs if pair.number == 0)
        for name in (*metrics_of(scored), HOLDOUT):
            assert point.values[name] == [each.adapter[name] for each in scored]
        for name in metrics_of(scored):
            assert point.values[f"{name}_delta"] == [each.delta(name) for each in scored]
        assert pixels(points[0].images) == pixels(pair.base for pair in pairs if pair.number == 0)
        assert points[0].values == {
            name: [each.base[name] for each in scored] for name in (*metrics_of(scored), HOLDOUT)
        }


def test_a_checkpoint_that_is_damaged_is_refused(tiny_base, tmp_path):
    folders = {step: random_adapter(tiny_base, tmp_path / str(step), seed=step) for step in (1, 2)}
    (folders[2] / "<new1>.safetensors").unlink()
    with pytest.raises(UserError, match=str(folders[2])):
        sweep.sweep(generation(tiny_base), folders, PROMPTS[:1], INSTANCES, Judges(Judge()))


def test_figures_are_means_over_concepts_with_intervals_over_prompts():
    cat, pot, joint = (Prompt("a {}", names) for names in (("cat",), ("pot",), ("cat", "pot")))
    values = {"text_alignment": [1.0, 2.0, 3.0, 9.0], "image_alignment": [0.2, 0.2, 0.8, 9.0]}
    found = sweep.summarize(Point(50, [cat, cat, pot, joint], values, []), resamples=4000, seed=0)
    text, image = (found.figures[name] for name in METRICS)
    # the two prompts' mean is 1, 1.5 or 2; the other concept's only prompt stays; the joint prompt does not count
    assert (text.value, text.low, text.high) == pytest.approx((2.25, 2, 2.5))
    assert (image.value, image.low, image.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.flat() == {
        f"{name}{end}": getattr(figure, key)
        for name, figure in zip(METRICS, (text, image), strict=True)
        for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def test_a_sweep_over_noise_seeds_has_intervals_over_prompts_and_seeds(tiny_base, tmp_path):
    how = generation(tiny_base, seeds=2, num_images=1)
    folder = random_adapter(tiny_base, tmp_path / "adapter", concepts=BOTH)
    prompts = [Prompt(text, ("cat",)) for text in ("a {} on red", "the {}", "my {}")]
    controls = [Prompt("a car", ()), prompts[0]]
    _, point = sweep.sweep(how, {50: folder}, prompts, INSTANCES, Judges(Judge()), controls=controls)
    ((_, pairs),) = generate_pairs(how, {"alone": folder}, prompts, controls)
    own, without = ([pair for pair in pairs if pair.is_control is kind] for kind in (False, True))
    scored = scores.score_prompts(own, INSTANCES, Judges(Judge()))
    values = np.array([np.subtract(*each.by_seed("image_alignment")[::-1]) for each in scored])
    assert values.shape == (3, 2)
    found = sweep.summarize(point, resamples=300, seed=1).figures
    low, high = bootstrap_interval([values], resamples=300, seed=1)
    delta = found["image_alignment_delta"]
    assert (delta.value, delta.low, delta.high) == pytest.approx((values.mean(), low, high), abs=1e-5)
    expected = drift.figures(without, {}, Judges(Judge()), resamples=300, seed=1)[None]
    assert {name: found[name] for name in expected} == expected
    assert set(expected) == {"drift", "class_drift"}


def test_the_alignment_of_photos_is_the_mean_over_concepts():
    # cat: 30 degrees are 10 from both instance images; dog: 100 are 30 from its one
    by_hand = (np.cos(np.radians(10)) + np.cos(np.radians(30))) / 2
    assert sweep.photo_alignment(HOLDOUT_PHOTOS, INSTANCES, Judges(Judge())) == pytest.approx(by_hand, abs=1e-6)


def test_tables_have_a_row_per_model_and_a_row_per_model_and_prompt(tmp_path):
    base = Point(0, PROMPTS[:2], {name: [0.1, 0.2] for name in METRICS}, [])
    deltas = {f"{name}_delta": [0.25, 0.5] for name in METRICS}
    point = Point(50, PROMPTS[:2], {name: [0.4, 0.6] for name in METRICS} | deltas, [])
    points = [base, point]
    summaries = [sweep.summarize(each, resamples=100, seed=0) for each in points]
    sweep.write_tables(points, summaries, tmp_path)
    models, prompts = (
        list(csv.DictReader((tmp_path / name).read_text().splitlines())) for name in ("sweep.csv", "per_prompt.csv")
    )
    assert [row["step"] for row in models] == ["0", "50"]
    assert [row["text_alignment"] for row in models] == ["0.150000", "0.500000"]
    assert [row["text_alignment_delta"] for row in models] == ["", "0.375000"], "the base model has no change"
    assert {row[HOLDOUT] for row in models} == {""}
    assert [(row["step"], row["concept"], row["prompt"], row["kind"]) for row in prompts] == [
        (step, prompt.concept_label, prompt.template, prompt.kind) for step in ("0", "50") for prompt in PROMPTS[:2]
    ]
    assert [float(row["image_alignment"]) for row in prompts] == [0.1, 0.2, 0.4, 0.6]
    assert [row["image_alignment_delta"] for row in prompts] == ["", "", "0.250000", "0.500000"]


def test_the_sheet_shows_every_prompt_for_every_model():
    colors = [(250, 0, 0), (0, 250, 0)]
    points = [Point(step, PROMPTS, {}, [plain(color)] * 3) for step, color in zip((0, 50), colors, strict=True)]
    sheet = np.asarray(sweep.sheet(points))
    columns = []
    for color in colors:
        ys, xs = np.nonzero((sheet == color).all(-1))
        columns.append((xs.min(), xs.max()))
        assert len(ys) == 3 * (xs.max() + 1 - xs.min()) ** 2, "a square per prompt"
    assert columns[0][1] < columns[1][0]


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch):
    """A folder to train in; a call trains six steps, with a checkpoint every second one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    params = tiny_params(tiny_base)
    settings = params.model_dump() | {"evaluate": {"steps": 2, "num_images": 1, "bootstrap": 100, "masked": False}}
    (tmp_path / "data/prompts").mkdir(parents=True)
    (tmp_path / "data/prompts/cat.txt").write_text("scene: a {} on red\nstyle: the {}\n")
    for folder, reds in (("instances", (20,)), ("holdout", (30, 40))):
        (tmp_path / "data" / folder / "cat").mkdir(parents=True)
        for red in reds:
            plain(red).save(tmp_path / "data" / folder / f"cat/{red}.png")
    settings["concepts"]["cat"]["holdout"] = "data/holdout/cat"
    write_prepared(tmp_path / "prepared", params)
    monkeypatch.setattr(clip.Clip, "load", lambda *arguments: Judge())

    def train(tracked=False):
        chosen = Params.model_validate(settings | {"tracking": {"enabled": tracked}})
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(chosen.model_dump()))
        return trainer.run(
            chosen, tmp_path / "prepared", checkpoints.RUNS, lambda run_id: tracking.start(chosen.tracking, "training")
        )

    return train


def run(*arguments):
    return CliRunner().invoke(cli.commands, ["sweep", *arguments], catch_exceptions=False).output


def test_the_sweep_of_a_complete_training_is_a_run_with_a_child_per_checkpoint(project, tmp_path):
    from mlflow import MlflowClient

    training_run = project(tracked=True)
    assert f"{training_run.path}: steps 2, 4, 6" in run("--num-images", "2")
    out = tmp_path / "results/sweep"
    files = {"metrics.json", "dvc.yaml", "sweep.csv", "per_prompt.csv", "trade_off.png", "prompts.jpg"}
    assert {path.name for path in out.iterdir()} == files
    metrics = json.loads((out / "metrics.json").read_text())
    assert (list(metrics["steps"]), metrics["num_prompts"], metrics["num_images"]) == (["2", "4", "6"], 2, 4)
    assert metrics["holdout_photos"] == pytest.approx(np.cos(np.radians([10, 20])).mean(), abs=1e-6)
    assert all(0 < figures["class_drift_low"] <= figures["class_drift"] for figures in metrics["steps"].values())
    assert "class_drift" not in metrics["base"]

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    training = client.get_run(training_run.run_id())
    runs = client.search_runs([training.info.experiment_id])
    (parent,) = (run for run in runs if "sweep" in run.info.run_name)
    assert parent.data.tags[tracking.TRAINING_RUN] == training.info.run_id
    history = client.get_metric_history(parent.info.run_id, "evaluation/image_alignment")
    logged = {(point.step, round(point.value, 6)) for point in history}
    assert logged == {(int(step), figures["image_alignment"]) for step, figures in metrics["steps"].items()}
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id, "sweep")}
    assert artifacts == {f"sweep/{name}" for name in files}
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == {"step 2", "step 4", "step 6"}
    models = client.search_logged_models([training.info.experiment_id])
    figures = {model.params["step"]: {each.key: each.value for each in model.metrics} for model in models}
    for step in ("2", "4", "6"):  # the checkpoint of the training has the figures of the sweep
        expected = children[f"step {step}"].data.metrics["evaluation/image_alignment"]
        assert figures[step]["evaluation/image_alignment"] == expected


def test_a_sweep_leaves_the_run_of_the_training_as_it_was(project, tmp_path):
    from mlflow import MlflowClient

    training_run = project(tracked=True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    before = client.get_run(training_run.run_id())
    run("--steps", "2")
    after = client.get_run(training_run.run_id())
    assert (after.info.end_time, after.data.metrics) == (before.info.end_time, before.data.metrics)


def test_a_second_sweep_gives_the_same_table_and_takes_base_images_from_the_cache(project, tmp_path):
    project()
    tables = []
    for _ in range(2):
        run("--steps", "2")
        tables.append((tmp_path / "results/sweep/per_prompt.csv").read_bytes())
        (kept,) = (tmp_path / ".base-images").iterdir()
        for path in kept.iterdir():
            assert path.suffix == ".png"
    assert tables[0] == tables[1]
    for path in kept.iterdir():  # what the base model is said to have generated
        plain(90).save(path)
    run("--steps", "2")
    first = next(csv.DictReader((tmp_path / "results/sweep/per_prompt.csv").read_text().splitlines()))
    assert float(first["image_alignment"]) == pytest.approx(np.cos(np.radians(90 - 20)), abs=1e-6)


def test_without_holdout_photos_a_sweep_leaves_them_out(project, tmp_path):
    project()
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["concepts"]["cat"]["holdout"] = None
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    run("--steps", "2")
    metrics = json.loads((tmp_path / "results/sweep/metrics.json").read_text())
    assert metrics["holdout_photos"] is None
    assert HOLDOUT not in metrics["base"]


def test_a_mistake_is_named_in_one_line_and_leaves_no_results(project, tmp_path):
    project()
    for arguments, named in (
        (["--steps", "2,7"], "step 7.*2, 4, 6"),
        (["--steps", "2;4"], "--steps: .*'2;4'"),
        (["--run", "nowhere"], "nowhere"),
        (["--out", "prepared"], "--out: prepared"),
    ):
        with pytest.raises(UserError, match=named) as error:
            run(*arguments)
        assert "\n" not in str(error.value)
    edited = (tmp_path / "params.yaml").read_text().replace("<new1>", "<new2>")
    (tmp_path / "params.yaml").write_text(edited)
    with pytest.raises(UserError, match=r"concepts\.cat: .*<new2>"):
        run()
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_a_complete_training_stay_until_the_next_begins(project, tmp_path, tiny_base):
    complete = project()
    assert checkpoints.find_run() == complete
    assert [checkpoints.step_of(path) for path in checkpoints.find_run().checkpoints()] == [2, 4, 6]
    edited = tiny_params(tiny_base, learning_rate=2e-3, max_steps=1)
    following = trainer.run(edited, tmp_path / "prepared", checkpoints.RUNS, lambda run_id: tracking.Tracker())
    assert [found.path for found in checkpoints.find_runs()] == [following.path]
    with pytest.raises(UserError, match="step 2"):
        checkpoints.find("2")
