"""The benchmark: its statistics, its meter, its models, and a whole measurement with a stand-in for the reference."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_params, write_prepared
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    against_reference,
    checkpoint_selection,
    models,
    photos_only,
    profile_step,
    project,
    scale,
    side,
    two_concepts,
)
from benchmarks.configs import Config, config
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.models import base
from customdiff.retrieval import clip_index
from customdiff.tracking import Tracker
from customdiff.training import trainer
from customdiff.training.selection import Grade

pytestmark = pytest.mark.benchmarks

MACHINE = project.Machine("cpu", 1, "no")

# What the benchmark asks of the reference: parse_args, main, and a tqdm of the module that is updated once a step.
STAND_IN = """
import argparse, time
from pathlib import Path
from tqdm.auto import tqdm

class Tokenizer:
    def encode(self, text, add_special_tokens):
        return [[1]] if isinstance(text, list) else [1]

def parse_args(given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--report_to", default="tensorboard")
    for name in ("max_train_steps", "num_class_images"):
        parser.add_argument("--" + name, type=int)
    for name in ("initializer_token", "instance_data_dir", "class_data_dir", "instance_prompt"):
        parser.add_argument("--" + name)
    return parser.parse_known_args(given)[0]

def main(args):
    import torch
    initializer_token, tokenizer = args.initializer_token, Tokenizer()
    assert tokenizer.encode([initializer_token], add_special_tokens=False) == [1], "not mended"
    assert args.report_to is None and args.instance_prompt == "photo of a <new1> cat"
    names = (Path(args.class_data_dir) / "images.txt").read_text().splitlines()
    assert args.num_class_images == len(names) == len(list((Path(args.class_data_dir) / "images").iterdir()))
    assert all(Path(name).is_file() for name in names)
    assert {path.suffix for path in Path(args.instance_data_dir).iterdir()} == {".png"}
    bar = tqdm(range(args.max_train_steps))
    for step in range(args.max_train_steps):
        time.sleep(0.02)
        bar.update(1)
        bar.set_postfix(loss=float(step), lr=1.0)
"""


def test_the_mended_call_is_the_one_that_transformers_answers_with_ids(tmp_path):
    tokenizer = models.whole_tokenizer(tmp_path / "tokenizer")
    scope = {"tokenizer": tokenizer, "initializer_token": "cat"}
    call = "ids = tokenizer.encode([initializer_token], add_special_tokens=False)\n"
    source, changes = side.mended(f"x = 1\n{call}")
    exec(source, scope)
    assert scope["ids"] == [tokenizer.get_vocab()["cat</w>"]]
    assert len(changes) == 1
    assert side.mended(source) == (source, [])


def test_steady_state_by_hand():
    """Ten slow steps to warm up, then half a second a step but for one pause of five seconds."""
    times = [100.0 + 3 * step for step in range(10)]
    for step in range(40):
        times.append(times[-1] + (5.0 if step == 17 else 0.5))
    notes = {"update_times": times, "losses": [1.0] * 50, "peak_training_mb": 7.0, "peak_process_mb": 8.0}
    run = against_reference.measured(notes, 90.0, 200.0, 30.0, block=1)
    assert len(run.step_seconds) == 40
    assert run.images_per_second == pytest.approx(8.0)  # 4 images in half a second
    assert run.images_per_second_overall == pytest.approx(40 * 4 / (39 * 0.5 + 5))
    assert run.first_step_seconds == pytest.approx(10.0)
    blocks = against_reference.measured(notes, 90.0, 200.0, 30.0, block=10)
    assert blocks.step_seconds == pytest.approx([0.5, (9 * 0.5 + 5) / 10, 0.5, 0.5])


def test_a_ratio_is_of_the_medians_and_its_range_of_the_rounds():
    ratio = against_reference.ratio([30.0, 20.0, 26.0], [10.0, 20.0, 8.0])
    assert (ratio.of_medians, ratio.least, ratio.most) == (2.6, 1.0, 3.25)


def test_the_meter_gives_each_region_its_own_time(monkeypatch):
    """A clock by hand: the outer part takes 1 + 2 s beside the inner one's 4; a call between steps is nobody's."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profile_step, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def spend(seconds):
        clock.now += seconds

    part = SimpleNamespace(inner=lambda: spend(4))
    part.outer = lambda: (spend(1), part.inner(), spend(2))
    part.step = lambda: (spend(0.5), part.outer(), part.inner())
    before = dict(vars(part))
    with profile_step.Meter() as meter:
        meter.wrap(part, "inner", "inner")
        meter.wrap(part, "outer", "outer")
        meter.wrap_step(part, "step")
        part.inner()
        for _ in range(profile_step.WARM_UP + 2):
            part.step()
    assert meter.seconds() == {"inner": 8.0, "outer": 3.0, profile_step.REST: 0.5}
    assert meter.step_seconds() == 11.5
    assert vars(part) == before


def test_the_floor_by_hand():
    operations = Counter({"aten.convolution": 600, "aten.convolution_backward": 200, "aten.mm": 300})
    assert profile_step.floor_seconds(operations, {"convolution": 400.0, "matrix product": 100.0}) == 5.0


def test_the_profile_counts_a_step_as_torch_counts_it(tiny_base, tmp_path):
    """The arithmetic of the UNet's forward pass and of the optimizer's step, against torch's counter on its own."""
    params = tiny_params(tiny_base, max_steps=profile_step.WARM_UP + 2, checkpointing_steps=100)
    write_prepared(tmp_path / "prepared", params)
    with profile_step.Meter() as meter:
        profile_step.wrap_training(meter)
        trainer.run(params, tmp_path / "prepared", tmp_path / "runs", lambda run_id: Tracker())
    pipe = base.load_pipeline(params.base)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipe.unet(torch.randn(4, 4, 8, 8), torch.zeros(4), torch.randn(4, 16, 32))
    forward = meter.operations()["UNet, forward"]
    assert sum(forward.values()) == counter.get_total_flops()
    backward = meter.operations()["backward"]
    assert sum(forward.values()) < sum(backward.values()) < 2 * sum(forward.values())  # frozen weights get no gradient
    regions = {"draw a batch", "text encoder, forward", "UNet, forward", "losses", "backward", "clip the gradient"}
    assert set(meter.seconds()) == regions | {"optimizer", "log", profile_step.REST}
    assert "images/s" in profile_step.report(meter, {"convolution": 1e9, "matrix product": 1e9})


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (models.sd14, {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        (models.sdxl, {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840}),
    ],
)
def test_the_models_have_as_many_parameters_as_the_published_ones(make, counts):
    with torch.device("meta"):
        pipe = make()
    assert {name: sum(p.numel() for p in pipe.components[name].parameters()) for name in counts} == counts


def test_the_tokenizer_is_as_large_as_clips_and_reads_as_before(tmp_path):
    whole = models.whole_tokenizer(tmp_path / "tokenizer")
    small = type(whole).from_pretrained(models.TOKENIZER)
    assert len(whole) == models.VOCABULARY
    assert whole.model_max_length == models.LENGTH
    caption = "photo of a cat on a red background"
    assert whole(caption).input_ids == small(caption).input_ids


@pytest.mark.slow
def test_a_whole_measurement(tiny_base, tmp_path):
    """Both sides in processes of their own: the real stages, and a stand-in that checks what it is given."""
    script = tmp_path / "reference.py"
    script.write_text(STAND_IN)
    steps = against_reference.WARM_UP + 4
    tiny = Config(32, None, augmentation=False, hflip=False, class_images=5)
    work = project.make(tmp_path / "work", tiny, MACHINE, steps, base=tiny_base)
    ours, theirs, about = against_reference.measure(work, script, "", rounds=1, workers=0)
    assert about["threads"] == 1
    assert theirs[0].losses == [float(step) for step in range(steps)]
    assert 0 < theirs[0].images_per_second < 4 / 0.02  # it sleeps 0.02 s a step of 4 images
    assert len(ours[0].losses) == steps
    assert 0 < ours[0].first_step_seconds < ours[0].run_seconds
    assert ours[0].peak_process_mb >= 0.99 * ours[0].peak_training_mb  # two counters of the kernel's, a few pages apart
    assert theirs[0].peak_process_mb < 0.8 * ours[0].peak_process_mb  # its own: it imports torch alone
    lines = against_reference.table(ours, theirs).splitlines()
    assert lines[1].split()[-6] == f"{theirs[0].images_per_second:.2f}"
    assert lines[1].split()[-5] == f"{ours[0].images_per_second:.2f}"
    assert against_reference.table(ours, []).splitlines()[1].split()[-2:] == ["-", lines[1].split()[-5]]

    script.write_text("raise RuntimeError('broken by the test')")
    with pytest.raises(UserError, match=r"reference ended with status 1: .*broken by the test"):
        against_reference.measure(work, script, "", rounds=1, workers=0)


def test_options_are_of_our_side_alone(tmp_path):
    options = {"train.compile": True, "train.validation.num_images": 2}
    work = project.Project(tmp_path, tmp_path / "base", config("quarter-256"), MACHINE, 3, options)
    work.ours.mkdir()
    work.write_params(1)
    train = yaml.safe_load((work.ours / "params.yaml").read_text())["train"]
    assert (train["compile"], train["validation"], train["max_steps"]) == (True, {"num_images": 2}, 3)
    assert not any("compile" in argument for argument in work.reference_arguments(1, 0))


@pytest.mark.parametrize("text", ["train.compile", "=true"])
def test_an_option_of_another_form_is_refused(text):
    with pytest.raises(UserError, match=r"--ours: '.*' is not of the form KEY=VALUE"):
        against_reference.main(configs=["sdxl-1024"], options=[text])


def test_a_missing_package_is_named_with_the_mend(tmp_path):
    script = tmp_path / "reference.py"
    script.write_text("import no_such_package_at_all")
    with pytest.raises(UserError, match=r"needs no_such_package_at_all, .* --packages FOLDER"):
        side.run_reference(script, "", [], side.Record().bar())


def test_an_unknown_configuration_is_refused():
    with pytest.raises(UserError, match="'huge' is not known; use one of embedded, quarter-256"):
        config("huge")


def test_the_synthetic_index_is_read_as_the_pools_own(tmp_path):
    scale._synthetic(tmp_path, 50)
    vectors = np.load(tmp_path / clip_index.EMBEDDINGS).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    hits = list(clip_index.query_index(tmp_path, vectors[7] / np.linalg.norm(vectors[7]), duplicate_similarity=2.0))
    assert hits[0].row == 7
    assert len(hits) == 50


def test_a_stage_that_fails_says_why(tmp_path):
    with pytest.raises(UserError, match=r"prepare failed: .*params\.yaml"):
        scale.stage(tmp_path, "prepare", "cat")


def test_a_trainings_own_notes_by_hand(tmp_path, monkeypatch):
    """Two images per second in batches of four are two seconds per step."""
    monkeypatch.setattr(scale, "stage", lambda *_, **__: scale.Cost(30.0, 0.0))
    (tmp_path / "results/train").mkdir(parents=True)
    (tmp_path / "results/train/performance.json").write_text(
        '{"peak_memory_mb": 900, "seconds": 18, "images_per_second": 2}'
    )
    rows = [f"{number},1.5" for number in range(1, 9)]
    (tmp_path / "results/train/steps.csv").write_text("\n".join(["step,loss", *rows]))
    assert scale.train(tmp_path) == scale.Trained(2.0, 900, 12.0, [1.5] * 8)


def test_a_table_is_markdown(capsys):
    table = scale.Table("px", "s a step")
    table.add(256, 1.2345)
    table.add(512, 12345.6)
    assert capsys.readouterr().out.splitlines() == [
        "| px | s a step |",
        "| --- | --- |",
        "| 256 | 1.23 |",
        "| 512 | 12346 |",
    ]


def test_painting_keeps_the_shape_and_changes_the_look():
    pixels = np.zeros((20, 10, 4), np.uint8)
    pixels[4:16, 2:8, 3] = 255
    pixels[4:16, 2:8, :3] = np.linspace(50, 200, 12).astype(np.uint8)[:, None, None]
    painted = np.asarray(photos_only.painted(Image.fromarray(pixels), ("#000000", "#ff0000", "#0000ff")))
    np.testing.assert_array_equal(painted[..., 3], pixels[..., 3])
    assert (painted[5:10, 3:7, 0] > painted[5:10, 3:7, 2]).all()
    assert (painted[13:15, 3:7, 2] > painted[13:15, 3:7, 0]).all()


def test_the_share_of_the_way_and_its_table():
    row = {"setting": "0.75", "base": 0.2, "adapter": 0.5, "holdout": 0.8, "text_base": 1.0, "text_adapter": 0.9}
    row |= {"background_base": 0.8, "background_adapter": 0.6, "drift": 0.25, "class_drift": 0.5, "prior_kid": 2.0}
    rows = [row | {"concept": name, "text_holdout": 0.95} for name in photos_only.CONCEPTS]
    assert photos_only.way(rows[0]) == pytest.approx(0.5)
    lines = photos_only.table(rows).splitlines()
    assert "| the six painted ones | 0.50 (0.50 to 0.50); text -10 %; n=6 |" in lines
    assert "| background recognized, of the base's rate | 75 % (0.60 of 0.80) |" in lines
    assert "| class drift | 0.50 |" in lines
    assert "text -5 %" in lines[-1]


def test_the_table_of_two_concepts():
    def row(setting, seed, cat, pot):
        found = {"cat": {"base": 0.1, "adapter": cat}, "teapot": {"base": 0.3, "adapter": pot}}
        photos = {"cat": 0.9, "teapot": 0.8}
        return {"pair": "cat+teapot", "setting": setting, "seed": seed, "together": found, "side_by_side": photos}

    rows = [row("a.b=1", 42, 0.6, 0.8), row("a.b=1", 43, 0.8, 0.8), row("a.b=2", 42, 0.1, 0.2)]
    assert two_concepts.table(rows, "together", "side_by_side").splitlines() == [
        "| together | holdout photos | base model | a.b=1 | a.b=2 |",
        "| --- | --- | --- | --- | --- |",
        "| cat (cat+teapot) | 0.90 | 0.10 | 0.70 | 0.10 |",
        "| teapot (cat+teapot) | 0.80 | 0.30 | 0.80 | 0.20 |",
        "| mean | 0.85 | 0.20 | 0.75 | 0.15 |",
    ]


def test_the_concepts_of_a_pair_have_tokens_of_their_own_and_the_changes_of_a_setting():
    values = two_concepts.values_of("cat+teapot", "prepare.together=0,train.max_steps=9", 43)
    assert [concept["modifier_token"] for concept in values["concepts"].values()] == ["<new1>", "<new2>"]
    assert (values["prepare"]["together"], values["train"]["max_steps"], values["base"]["seed"]) == (0, 9, 43)
    Params.model_validate(values)


def test_results_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(photos_only, "set_up", lambda work: None)
    measured = []

    def run(name, seed):
        measured.append((name, seed))
        return {"concept": name, "seed": seed, "score": 0.5}

    wanted = [{"concept": "cat", "seed": seed} for seed in (42, 43)]
    photos_only.rows_of(tmp_path, "rows.jsonl", wanted[:1], run)
    rows = photos_only.rows_of(tmp_path, "rows.jsonl", wanted, run)
    assert [row["seed"] for row in rows] == [42, 43]
    assert measured == [("cat", 42), ("cat", 43)]
    assert photos_only.rows_of(tmp_path, "rows.jsonl", [], run) == rows


def selected_run(grades: list[float], evaluated: list[float]) -> dict:
    """A run of checkpoint_selection: grades and later scores of of each 50 steps, the second selected."""
    return {
        "concept": "cat",
        "seed": 42,
        "selected": 100,
        "last": 50 * len(grades),
        "grades": [Grade(50 * number, 0, 0, 0, 0, score).to_dict() for number, score in enumerate(grades, 1)],
        "evaluated": {str(50 * number): {"score": score} for number, score in enumerate(evaluated, 1)},
        "best_minus_last": [0.2, 0.1, 0.3],
    }


def test_the_table_of_selected_checkpoints():
    """The grades 0.2, 0.6, 0.4 rank the evaluated scores 0.1, 0.5, 0.3 rightly; patience 1 stops after the third."""
    row = selected_run([0.2, 0.6, 0.4], [0.1, 0.5, 0.3])
    assert checkpoint_selection.rank_correlation(row) == pytest.approx(1)
    assert checkpoint_selection.stopped_at(row, 1) == 150
    lines = checkpoint_selection.table([row]).splitlines()
    assert lines[-1] == "| cat, 42 | 100 | 0.500 | 0.300 | +0.200 (+0.100 to +0.300) | 0.500 at 100 | 1.00 | 150 |"


def test_the_table_of_rules_tells_what_each_would_have_selected():
    """0.60 is the highest grade, 0.55 the latest within 0.08; patience 2 stops after the fourth and sees it too."""
    row = selected_run([0.2, 0.6, 0.3, 0.55, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert checkpoint_selection.chosen(row, 0.0, None) == (100, 250)
    assert checkpoint_selection.chosen(row, 0.08, 2) == (200, 200)
    rules = [line.split(" | ")[1:] for line in checkpoint_selection.rules_table([row]).splitlines()[2:]]
    assert rules[0] == ["0.500", "+0.000 to +0.000", "250 |"]
    assert rules[1] == ["0.200", "-0.300 to -0.300", "250 |"]
    assert rules[4] == ["0.400", "-0.100 to -0.100", "200 |"]
    assert rules[5] == ["0.500", "+0.000 to +0.000", "250 |"]
