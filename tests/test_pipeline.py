"""The stages under DVC, in a clone of its own: whole runs, and which stages each edit reruns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from campaign.params_cases import NAMES
from conftest import ROOT

from customdiff import config, stage_inputs

DVC = [sys.executable, "-m", "dvc"]
GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]

# The embedded default with as little work as possible; class images come from a folder, so that no index is built.
SMALL = {
    "retrieve": {"backend": "folder", "num_class_images": 5, "minimum": 4, "folder": "class-images"},
    "prepare": {"views": 4},
    "train": {"max_steps": 4, "checkpointing_steps": 2, "validation": {"every": 2, "steps": 2}},
    "evaluate": {"num_images": 1, "steps": 2, "prompts": "prompts", "bootstrap": 100, "drift_prompts": 2},
}
TEAPOT = {
    "source": {"path": "data/concepts/teapot"},
    "modifier_token": "<new2>",
    "class_prompt": "teapot",
    "instance_prompt": "photo of a {} teapot",
}


def run(clone: Path, *command: str, check: bool = True, **environment: str) -> str:
    """Output of a command in the clone, with this Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    settings |= {"PATH": path, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"} | environment
    done = subprocess.run(command, cwd=clone, env=settings, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def merge(values: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def edit(clone: Path, changes: dict) -> None:
    path = clone / "params.yaml"
    values = yaml.safe_load(path.read_text())
    merge(values, changes)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def nested(key: str, value) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of this work tree as a project of its own, with a small params.yaml, run once and committed."""
    folder = tmp_path_factory.mktemp("clone")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    no_captions = shutil.ignore_patterns("*.txt", "*.md")
    shutil.copytree(ROOT / "data/concepts/teapot", folder / "class-images", ignore=no_captions)  # any images will do
    (folder / "prompts").mkdir()
    (folder / "prompts/default.txt").write_text("a {} on the grass\na {} on a red background\n")
    (folder / "dvc.lock").unlink(missing_ok=True)
    edit(folder, SMALL)
    run(folder, "git", "init", "--quiet")
    (folder / "output.txt").write_text(run(folder, *DVC, "repro"))
    run(folder, "git", "add", "--all")
    run(folder, *GIT, "commit", "--quiet", "-m", "start")
    return folder


@pytest.fixture
def changed(clone, monkeypatch):
    """Which stages would rerun now, but `inputs`, which always runs; what was edited is restored afterwards."""
    from dvc.repo import Repo

    monkeypatch.chdir(clone)

    def names() -> set[str]:
        stage_inputs.write_inputs(config.load())
        with Repo(str(clone)) as repo:
            return set(repo.status()) - {"inputs"}

    yield names
    subprocess.run(["git", "checkout", "--quiet", "--", "."], cwd=clone, check=True)
    stage_inputs.write_inputs(config.load())


def test_one_command_learns_and_evaluates(clone):
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())
    for key in ("text_alignment", "image_alignment", "masked_image_alignment", "identity"):
        metric = metrics[key]
        assert metric["delta"] == pytest.approx(metric["adapter"] - metric["base"], abs=1e-9)
        assert metric["delta_low"] <= metric["delta"] <= metric["delta_high"]
        assert metrics["concepts"]["cat"][key] == metric
    assert len((clone / "results/train/steps.csv").read_text().splitlines()) == 5
    assert (clone / "models/adapter/pytorch_custom_diffusion_weights.safetensors").stat().st_size > 1000
    for name in ("report.html", "contact_sheet.jpg", "per_prompt.csv"):
        assert (clone / "results/evaluate" / name).stat().st_size > 0
    assert len(list((clone / "results/train/validation").glob("*.png"))) == 6  # two images at steps 0, 2 and 4


def test_mlflow_shows_the_run(clone):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'customdiff'")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])[0]
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "cat · custom_diffusion · 4 steps"
    assert found.data.params["train.max_steps"] == "4"
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())
    logged = found.data.metrics["evaluation/image_alignment"]
    assert logged == pytest.approx(metrics["image_alignment"]["adapter"])
    assert found.data.metrics["train/seconds"] > 0
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert "contact_sheet.jpg" in found.data.tags["mlflow.note.content"]
    outs = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]["download-data@cat"]["outs"]
    digests = {each.dataset.name: each.dataset.digest for each in found.inputs.dataset_inputs}
    assert digests["cat instance images"] == outs[0]["md5"]


def test_mlflow_has_checkpoints_and_the_registered_adapter(clone):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    champion = client.get_model_version_by_alias("customdiff-cat", "champion")
    run = client.get_run(champion.run_id)
    models = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{champion.run_id}'")
    assert {model.name for model in models} == {"cat-step-2", "cat-step-4", "cat-adapter"}
    (adapter,) = (model for model in models if model.name == "cat-adapter")
    assert champion.source == f"models:/{adapter.model_id}"
    figure = next(metric for metric in adapter.metrics if metric.key == "evaluation/image_alignment")
    assert figure.value == run.data.metrics["evaluation/image_alignment"]
    assert figure.dataset_name == "evaluation prompts"
    registered = run_sample(clone, "models:/customdiff-cat@champion", "samples/registered")
    assert registered == run_sample(clone, "models/adapter", "samples/own")


def run_sample(clone: Path, adapter: str, out: str) -> bytes:
    """The grid that `customdiff sample` draws with an adapter."""
    sample = ["customdiff.cli", "sample", "a <new1> cat", "--steps", "2", "--out", out, "--adapter", adapter]
    run(clone, sys.executable, "-m", *sample)
    return (clone / out / "grid.png").read_bytes()


def test_a_second_run_gives_the_same_bytes_and_leaves_git_clean(clone):
    lock = (clone / "dvc.lock").read_bytes()
    shutil.rmtree(clone / ".checkpoints")
    run(clone, *DVC, "repro", "--force")
    assert (clone / "dvc.lock").read_bytes() == lock
    assert run(clone, "git", "status", "--porcelain") == ""


def test_nothing_reruns_when_nothing_changed(changed):
    assert changed() == set()


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("base.device", "cpu", set()),
        ("base.seed", 1, {"prepare@cat", "train", "evaluate"}),
        ("train.learning_rate", 1e-3, {"train", "evaluate"}),
        ("train.max_steps", 5, {"train", "evaluate"}),
        (
            "train.with_prior_preservation",
            False,
            {"index-pool", "retrieve-class-images@cat", "prepare@cat", "train", "evaluate"},
        ),
        ("evaluate.num_images", 2, {"evaluate"}),
        ("evaluate.bootstrap", 2000, {"evaluate"}),
        ("evaluate.identity", None, {"evaluate"}),
        ("evaluate.masked", False, {"evaluate"}),
        ("evaluate.drift_prompts", 3, {"evaluate"}),
        ("concepts.cat.holdout", "data/holdout/teapot", {"evaluate"}),
        ("concepts.cat.holdout", None, {"evaluate"}),
        ("prepare.hflip", True, {"prepare@cat"}),
        ("prepare.resolution", 64, {"prepare@cat", "train"}),
        ("prepare.backgrounds.share", 0.5, {"prepare@cat", "evaluate"}),
        ("prepare.masks", "none", {"prepare@cat", "evaluate"}),
        ("train.mask_weight", 0.5, {"prepare@cat", "train"}),
        ("retrieve.num_class_images", 4, {"retrieve-class-images@cat"}),
        ("retrieve.index.pool", "elsewhere", set()),
        ("retrieve.generate.steps", 3, set()),
        ("retrieve.min_similarity", 0.5, set()),
        ("retrieve.fill", "generate", {"retrieve-class-images@cat"}),
        ("download.minimum", 3, {"download-data@cat", "retrieve-class-images@cat"}),
        ("concepts.cat.source.path", "data/concepts/teapot", {"download-data@cat"}),
        ("concepts.cat.class_prompt", "animal", {"retrieve-class-images@cat", "prepare@cat", "train", "evaluate"}),
        ("concepts.cat.initializer_token", "dog", {"train"}),
        ("tracking.log_every", 1, set()),
        ("tracking.score", "image_alignment", set()),
    ],
)
def test_an_edit_reruns_exactly_the_stages_that_read_it(clone, changed, key, value, stages):
    """Stages that read the key itself; those behind them follow if an output changes."""
    edit(clone, nested(key, value))
    assert changed() == stages


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("data/concepts/cat/01.png", {"download-data@cat"}),
        ("data/captioner/config.json", {"prepare@cat"}),
        ("class-images/01.png", {"retrieve-class-images@cat"}),
        ("prompts/default.txt", {"evaluate"}),
        ("data/judge/config.json", {"evaluate"}),
        ("data/identity/config.json", {"evaluate"}),
        ("data/segmenter/config.json", {"prepare@cat", "evaluate"}),
        ("data/holdout/cat/README.md", {"evaluate"}),
        ("data/clip/config.json", set()),
        ("data/base/vae/config.json", {"prepare@cat", "train", "evaluate"}),
        ("customdiff/models/methods.py", {"retrieve-class-images@cat", "prepare@cat", "train", "evaluate"}),
        ("customdiff/training/objective.py", {"train"}),
        ("customdiff/publishing/hub.py", set()),
    ],
)
def test_an_edited_file_reruns_the_stages_that_use_it(clone, changed, path, stages):
    with (clone / path).open("ab") as file:
        file.write(b"\n")
    assert changed() == stages


def test_a_folder_outside_the_project_is_tracked(clone, changed, tmp_path):
    photos = shutil.copytree(clone / "data/concepts/cat", tmp_path / "photos")
    edit(clone, nested("concepts.cat.source.path", str(photos)))
    assert changed() == {"download-data@cat"}
    before = Path("data/inputs/download-data/cat.json").read_bytes()
    (photos / "01.png").unlink()
    changed()
    assert Path("data/inputs/download-data/cat.json").read_bytes() != before


def test_a_second_concept_leaves_the_images_of_the_first_alone_but_is_shown_beside_them(clone, changed):
    edit(clone, {"concepts": {"teapot": TEAPOT}})
    new = {"download-data@teapot", "retrieve-class-images@teapot", "prepare@teapot"}
    assert changed() == new | {"prepare@cat", "train", "evaluate"}


def test_without_a_prior_no_class_images_are_retrieved(clone, changed):
    edit(clone, nested("train.with_prior_preservation", False))
    output = run(clone, *DVC, "repro", "prepare@cat")
    assert "no class images" in output
    assert not list((clone / "data/classes/cat").glob("images/*"))
    assert not (clone / "data/prepared/cat/class.safetensors").exists()
    run(clone, "git", "checkout", "--quiet", "--", ".")
    run(clone, *DVC, "checkout")


def test_a_mistake_stops_before_any_work(clone, changed):
    """Also a section that no stage reads, and also if no stage would run."""
    images = sorted((clone / "data/instances/cat").iterdir())
    edit(clone, {"trian": {"max_steps": 1}})
    output = run(clone, *DVC, "repro", check=False)
    assert "params.yaml: trian: unknown key; did you mean train?" in output
    assert "Traceback" not in output
    assert sorted((clone / "data/instances/cat").iterdir()) == images


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_concept_name_never_reaches_the_shell(clone, changed, name, alone):
    """Neither in `dvc repro`, nor where the user asks for its stage alone, even if its inputs exist."""
    edit(clone, {"concepts": {name: TEAPOT}})
    docs = sorted((clone / "docs").iterdir())
    if not alone:
        output = run(clone, *DVC, "repro", check=False)
        assert "params.yaml: concepts" in output or "ERROR: output 'docs' is specified in" in output
    else:
        inputs = clone / f"data/inputs/download-data/{name}.json"
        inputs.parent.mkdir(parents=True, exist_ok=True)
        inputs.touch()
        output = run(clone, *DVC, "repro", "--single-item", f"download-data@{name}", check=False)
        assert "error: params.yaml: concepts" in output or "ERROR" in output
        if not inputs.resolve().is_relative_to(clone / "data/inputs"):
            inputs.unlink()
    assert "Traceback" not in output
    assert not list(clone.rglob("PWNED*"))
    assert sorted((clone / "docs").iterdir()) == docs


def test_an_unreachable_tracking_server_is_a_warning(clone):
    output = run(clone, sys.executable, "stages/train.py", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "warning" in output.lower()
    assert "Traceback" not in output
