"""The stages under DVC, in a clone of its own: one whole run, then which stages each edit of params.yaml reruns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

DVC = [sys.executable, "-m", "dvc"]

# The embedded default made as small as it goes; class images come from a folder, so that no index is built.
SMALL = {
    "retrieve": {"backend": "folder", "num_class_images": 5, "minimum": 4, "folder": "class-images"},
    "prepare": {"views": 4},
    "train": {"max_steps": 4, "checkpointing_steps": 2, "validation": {"every": 2, "steps": 2}},
    "evaluate": {"num_images": 1, "steps": 2, "prompts": "prompts", "bootstrap": 100},
}


def run(clone: Path, *command: str, check: bool = True, **environment: str) -> str:
    """Output of a command in the clone, with the tests' own Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    settings |= {"PATH": path, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"} | environment
    done = subprocess.run(command, cwd=clone, env=settings, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def edit(clone: Path, change) -> None:
    path = clone / "params.yaml"
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def changed(clone: Path) -> set[str]:
    """Stages that `dvc status` calls changed."""
    return set(json.loads(run(clone, *DVC, "status", "--json").splitlines()[-1]))


def merge(values: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of this work tree as a project of its own, with a small params.yaml, run once from end to end."""
    folder = tmp_path_factory.mktemp("clone")
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    pictures = shutil.ignore_patterns("*.txt", "*.md")
    shutil.copytree(ROOT / "data/concepts/teapot", folder / "class-images", ignore=pictures)  # any pictures will do
    (folder / "prompts").mkdir()
    (folder / "prompts/default.txt").write_text("a {} on the grass\na {} on a red background\n")
    edit(folder, lambda values: merge(values, SMALL))
    run(folder, "git", "init", "--quiet")
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "start")
    (folder / "output.txt").write_text(run(folder, *DVC, "repro"))
    return folder


def test_one_command_learns_and_grades(clone):
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())
    for key in ("text_alignment", "image_alignment"):
        assert metrics[f"{key}_delta"] == pytest.approx(metrics[key] - metrics[f"base_{key}"], abs=1e-6)
        low, high = metrics[f"{key}_delta_ci95"]
        assert low <= metrics[f"{key}_delta"] <= high
    assert len((clone / "results/train/steps.csv").read_text().splitlines()) == 5
    assert (clone / "models/adapter/pytorch_custom_diffusion_weights.safetensors").stat().st_size > 1000
    for name in ("report.html", "contact_sheet.jpg", "per_prompt.csv"):
        assert (clone / "results/evaluate" / name).stat().st_size > 0
    assert len(list((clone / "results/train/validation").glob("*.png"))) == 4


def test_mlflow_shows_the_run(clone):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'customdiff'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.max_steps"] == "4"
    metrics = json.loads((clone / "results/evaluate/metrics.json").read_text())
    assert found.data.metrics["image_alignment"] == pytest.approx(metrics["image_alignment"])
    assert [point.step for point in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 2, 3, 4]


def test_nothing_reruns_when_nothing_changed(clone):
    assert changed(clone) == set()


@pytest.mark.parametrize(
    ("key", "value", "stages"),
    [
        ("train.learning_rate", 1e-3, {"train"}),
        ("train.max_steps", 5, {"train"}),
        ("evaluate.num_images", 2, {"evaluate"}),
        ("evaluate.guidance_scale", 3.0, {"evaluate"}),
        ("prepare.hflip", True, {"prepare@cat"}),
        ("prepare.backgrounds.share", 0.5, {"prepare@cat"}),
        ("prepare.masks", "none", {"prepare@cat"}),
        ("train.mask_weight", 0.5, {"prepare@cat", "train"}),
        ("retrieve.num_class_images", 4, {"retrieve-class-images@cat"}),
        ("download.minimum", 3, {"download-data@cat", "retrieve-class-images@cat"}),
        ("concepts.cat.source.path", "data/holdout/cat", {"download-data@cat", "train"}),
        ("concepts.cat.class_prompt", "animal", {"retrieve-class-images@cat", "prepare@cat", "train"}),
        ("concepts.cat.initializer_token", "dog", {"train"}),
        ("tracking.log_every", 1, set()),
    ],
)
def test_an_edit_changes_the_stages_that_depend_on_it(clone, key, value, stages):
    """Stages that read the key itself; those behind them follow where an output really changed."""
    before = (clone / "params.yaml").read_text()

    def change(values):
        *parents, last = key.split(".")
        for parent in parents:
            values = values[parent]
        values[last] = value

    try:
        edit(clone, change)
        assert changed(clone) == stages
    finally:
        (clone / "params.yaml").write_text(before)


def test_a_second_concept_leaves_the_first_ones_images_alone(clone):
    before = (clone / "params.yaml").read_text()
    second = {
        "source": {"path": "data/concepts/teapot"},
        "modifier_token": "<new2>",
        "class_prompt": "teapot",
        "instance_prompt": "photo of a {} teapot",
    }
    try:
        edit(clone, lambda values: values["concepts"].update(teapot=second))
        new = {"download-data@teapot", "retrieve-class-images@teapot", "prepare@teapot"}
        assert changed(clone) == new | {"train"}
    finally:
        (clone / "params.yaml").write_text(before)


def test_a_learning_rate_encodes_no_image_again(clone):
    edit(clone, lambda values: values["train"].update(learning_rate=3e-4))
    output = run(clone, *DVC, "repro")
    ran = {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")}
    assert ran == {"train", "evaluate"}


def test_a_mistake_stops_before_any_work(clone):
    before = (clone / "params.yaml").read_text()
    images = sorted((clone / "data/instances/cat").iterdir())
    try:
        edit(clone, lambda values: values["download"].update(minimun=3))
        output = run(clone, sys.executable, "stages/download_data.py", "cat", check=False)
        assert output.strip().endswith("params.yaml: download.minimun: unknown key; did you mean minimum?")
        assert "Traceback" not in output
        assert sorted((clone / "data/instances/cat").iterdir()) == images
    finally:
        (clone / "params.yaml").write_text(before)


def test_a_dead_tracking_server_is_a_warning(clone):
    output = run(clone, sys.executable, "stages/train.py", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "warning" in output.lower()
    assert "Traceback" not in output
