"""The stage `evaluate` writes all of its results, twice the same, and leaves earlier ones where it fails."""

import csv
import json
import runpy

import pytest
import torch
import yaml
from conftest import concept_values, noisy_images, random_adapter
from PIL import Image
from stand_ins import Judge, plain
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from customdiff.evaluation.report import PLANE
from customdiff.evaluation.scores import METRICS
from customdiff.models import clip
from customdiff.models.vision import VisionEncoder


@pytest.fixture
def project(tiny_base, tmp_path, monkeypatch, pytestconfig):
    """A project folder with all that the stage reads; a call runs the stage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    concepts = {"tom": concept_values()}
    random_adapter(tiny_base, tmp_path / "models/adapter", concepts=concepts)
    (tmp_path / "data/instances/tom").mkdir(parents=True)
    plain(30).save(tmp_path / "data/instances/tom/1.png")
    (tmp_path / "data/prompts").mkdir()
    (tmp_path / "data/prompts/cat.txt").write_text("scene: a {} on the grass\nstyle: a red {}\n")
    settings = {
        "base": {"model": str(tiny_base), "device": "cpu"},
        "concepts": concepts,
        "evaluate": {"steps": 2, "num_images": 2, "bootstrap": 100, "masked": False, "drift_prompts": 0},
        "tracking": {"enabled": False},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(clip.Clip, "load", lambda *arguments, **options: Judge())
    return lambda: runpy.run_path(str(pytestconfig.rootpath / "stages/evaluate.py"), run_name="__main__")


def contents(folder):
    # the report's charts and the sheet are as much results as the metrics are
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_stage_writes_all_of_its_results_twice_the_same(project, tmp_path):
    project()
    results = tmp_path / "results/evaluate"
    files = {path.name for path in results.iterdir()}
    assert files == {"metrics.json", "summary.json", "per_prompt.csv", "contact_sheet.jpg", "report.html", "images"}
    first = contents(results)
    project()
    assert contents(results) == first


def test_the_metrics_are_those_of_the_images(project, tmp_path, capsys):
    project()
    results = tmp_path / "results/evaluate"
    metrics = json.loads((results / "metrics.json").read_text())
    assert (metrics["num_prompts"], metrics["num_images"], set(metrics["concepts"])) == (2, 4, {"tom"})
    (instance,) = Judge().images([plain(30)])
    for kind, key in (("base", "base"), ("customized", "adapter")):
        paths = sorted((results / "images" / kind / "tom").iterdir())
        assert len(paths) == 4
        cosines = Judge().images([Image.open(path) for path in paths]) @ instance
        assert metrics["image_alignment"][key] == pytest.approx(cosines.mean(), abs=1e-5)
    for name in {path.name for path in paths}:
        base, customized = (results / "images" / kind / "tom" / name for kind in ("base", "customized"))
        assert base.read_bytes() != customized.read_bytes(), "the adapter must change the image"
    with open(results / "per_prompt.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in PLANE:
        mean = sum(float(row[f"{name}_delta"]) for row in rows) / len(rows)
        assert metrics[name]["delta"] == pytest.approx(mean, abs=2e-6)
    assert "results/evaluate/report.html" in capsys.readouterr().out


def test_the_verdict_is_in_the_terminal_the_report_and_the_metrics(project, tmp_path, capsys):
    project()
    output = capsys.readouterr().out
    assert "concepts.tom.source" in output  # a single photo
    assert "photo_share" not in json.loads((tmp_path / "results/evaluate/metrics.json").read_text())
    plain(60).save(tmp_path / "data/instances/tom/2.png")
    project()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tom: ")]
    metrics = json.loads((tmp_path / "results/evaluate/metrics.json").read_text())
    ceiling = float(Judge().images([plain(30)])[0] @ Judge().images([plain(60)])[0])
    image, report = metrics["image_alignment"], (tmp_path / "results/evaluate/report.html").read_text()
    if ceiling - image["base"] < 0.05:
        assert "photo_share" not in metrics
    else:
        share = (image["adapter"] - image["base"]) / (ceiling - image["base"])
        assert metrics["photo_share"]["value"] == pytest.approx(share, abs=1e-3)
        assert f"{100 * share:.0f} %" in line
    assert line in report


def everything(folder):
    """Turn on all figures: a vision model, a segmenter, holdout photos and class images."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).save_pretrained(folder / "identity")
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder / "identity")
    segmenter = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, decoder_hidden_size=8, num_attention_heads=[1] * 4
    )
    segmenter.id2label = {0: "background", 1: "subject"}
    SegformerForSemanticSegmentation(segmenter).save_pretrained(folder / "segmenter")
    SegformerImageProcessorPil(size=side).save_pretrained(folder / "segmenter")
    for path, count in (("holdout", 2), ("data/classes/tom/images", 4)):
        noisy_images(folder / path, count, seed=count)
    plain(60).save(folder / "data/instances/tom/2.png")
    (folder / "data/prompts/drift.txt").write_text("a dog\na red pot\na small pot\n")
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["concepts"]["tom"]["holdout"] = "holdout"
    values["prepare"] = {"segmenter": "segmenter"}
    values["evaluate"] |= {"identity": "identity", "masked": True, "drift_prompts": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


def test_all_figures_are_in_metrics_json_the_table_and_the_report(project, tmp_path, capsys):
    everything(tmp_path)
    project()
    results = tmp_path / "results/evaluate"
    metrics = json.loads((results / "metrics.json").read_text())
    for group in (metrics, metrics["concepts"]["tom"]):
        for name in METRICS:
            assert set(group[name]) == {"base", "adapter", "delta", "delta_low", "delta_high"}
        for name in ("class_drift", "prior_kid"):
            assert group[name]["low"] <= group[name]["high"]
    assert set(metrics["concepts"]["tom"]["holdout"]) == {"image_alignment", "masked_image_alignment", "identity"}
    assert 0 <= metrics["drift"]["value"] <= 2
    assert 0 <= metrics["unmasked"] <= 1
    paths = sorted((results / "images/customized/without-token").iterdir())
    assert len(paths) == 4
    encoder = VisionEncoder.load(tmp_path / "identity")
    both = [
        encoder.images([Image.open(results / "images" / kind / "without-token" / path.name) for path in paths])
        for kind in ("base", "customized")
    ]
    distances = 1 - (both[0].astype(float) * both[1].astype(float)).sum(axis=1)
    other = [number for number, path in enumerate(paths) if "a-dog" in path.name or "a-red-pot" in path.name]
    assert metrics["drift"]["value"] == pytest.approx(distances[other].mean(), abs=1e-5)
    with open(results / "per_prompt.csv", newline="") as file:
        assert set(METRICS) <= set(next(csv.DictReader(file)))
    report = (results / "report.html").read_text()
    for title in ("Identity", "Masked image alignment", "Prior KID", "Drift", "Diversity", "Images without the token"):
        assert title in report


@pytest.mark.parametrize(
    ("path", "text", "named"),
    [
        ("data/prompts/cat.txt", "a cat\n", "data/prompts/cat.txt: line 1"),
        ("models/adapter/adapter.json", "{}", "models/adapter/adapter.json"),
    ],
)
def test_a_stage_that_fails_names_the_mistake_and_leaves_earlier_results(project, tmp_path, capsys, path, text, named):
    kept = tmp_path / "results/evaluate/metrics.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("old")
    (tmp_path / path).write_text(text)
    with pytest.raises(SystemExit) as stop:
        project()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {named}")
    assert error.count("\n") == 1
    assert kept.read_text() == "old"
