"""What a colleague gets: from a clone alone, from a team's remote, and from a shared experiment."""

import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_pipeline import DVC, GIT, clone, edit, run

from customdiff.adapters import adapter
from customdiff.cli.sweep import DVC_PLOTS
from customdiff.models import base

__all__ = ["clone"]  # the fixture: a project that ran once
SAMPLE = [sys.executable, "-m", "customdiff.cli", "sample", "a <new1> cat", "--steps", "2", "--out", "samples"]


def test_the_adapter_in_the_repository_fits_the_base_model():
    """A clone can draw at once; data/adapters/README.md says how to make it again after a change of data/base."""
    learned = adapter.read(ROOT / "data/adapters/cat")
    pipe = base.load_pipeline(learned.config.base_model(str(ROOT / "data/base")))
    adapter.inject(pipe, learned)


@pytest.fixture(scope="module")
def team(clone, tmp_path_factory):
    """The project with a remote, pushed to it and to a bare git repository; returns a colleague's clone."""
    folder = tmp_path_factory.mktemp("team")
    run(clone, *DVC, "remote", "add", "--default", "team", str(folder / "store"))
    run(clone, *GIT, "commit", "--quiet", "-am", "Use the team's remote")
    run(clone, *DVC, "push", "--run-cache")
    run(clone, *DVC, "exp", "save", "--name", "shared-idea")
    run(clone, *GIT, "tag", "--annotate", "adapter@v0.1.0", "--message", "First version")
    run(folder, "git", "init", "--quiet", "--bare", "origin.git")
    run(clone, "git", "remote", "add", "origin", str(folder / "origin.git"))
    run(clone, "git", "push", "--quiet", "--tags", "origin", "HEAD")
    run(clone, *DVC, "exp", "push", "origin", "shared-idea")
    branch = run(clone, "git", "rev-parse", "--abbrev-ref", "HEAD").strip()
    run(folder, "git", "clone", "--quiet", "--branch", branch, "origin.git", "colleague")
    return folder / "colleague"


@pytest.mark.slow
def test_a_pull_brings_everything_and_nothing_reruns(clone, team):
    run(team, *DVC, "pull")
    for name in ("models/adapter/adapter.json", "results/evaluate/report.html", "data/prepared/cat/sheet.jpg"):
        assert (team / name).read_bytes() == (clone / name).read_bytes()
    run(team, *SAMPLE)
    assert (team / "samples/grid.png").stat().st_size > 0
    assert "Running stage 'train'" not in run(team, *DVC, "repro")
    assert run(team, "git", "status", "--porcelain", "--untracked-files=no") == ""


@pytest.mark.slow
def test_a_shared_experiment_can_be_pulled(team):
    run(team, *DVC, "exp", "pull", "origin", "shared-idea")
    assert "shared-idea" in run(team, *DVC, "exp", "list")


@pytest.mark.slow
def test_the_registered_artifact_can_be_fetched(team, tmp_path):
    run(team, *DVC, "artifacts", "get", str(team), "adapter", "--out", str(tmp_path / "fetched"))
    own = {path.name: path.read_bytes() for path in (team / "models/adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in Path(tmp_path, "fetched").iterdir()} == own


@pytest.mark.slow
def test_plots_open_without_a_network(clone):
    sweep = clone / "results/sweep"
    sweep.mkdir(parents=True)
    (sweep / "dvc.yaml").write_text(DVC_PLOTS)
    (sweep / "sweep.csv").write_text("step,text_alignment,image_alignment\n0,1.4,0.2\n50,1.3,0.5\n")
    run(clone, sys.executable, "-m", "customdiff.cli", "offline-plots")
    output = run(clone, *DVC, "plots", "show")
    assert "failed" not in output
    page = (clone / "dvc_plots/index.html").read_text(encoding="utf-8")
    for title in (
        "Image alignment by prompt",
        "Text alignment by prompt",
        "Training loss",
        "Trade-off",
        "contact_sheet.jpg",
    ):
        assert title in page
    assert 'src="http' not in page
    assert "vegaEmbed" in page


@pytest.mark.slow
def test_a_table_of_six_experiments_fits_a_terminal(clone):
    """With the command of `make experiments`, and two parameters with long names that vary."""
    commands = run(ROOT, "make", "--dry-run", "--old-file=install", "experiments").splitlines()
    recipe = next(command for command in commands if command.startswith("dvc exp show"))
    path = clone / "results/evaluate/summary.json"
    for number in range(6):  # as experiments would leave it
        figures = {name: round(value + number / 8, 3) for name, value in json.loads(path.read_text()).items()}
        path.write_text(json.dumps(figures))
        edit(clone, {"train": {"learning_rate": 1e-4 + number / 1e5, "prior_loss_weight": 0.5 + number / 8}})
        run(clone, *DVC, "exp", "save", "--force", "--name", f"idea-number-{number}")
        run(clone, "git", "checkout", "--quiet", ".")
    table = run(clone, *DVC, *shlex.split(recipe)[1:], "--no-pager", COLUMNS="250")
    columns = ["Experiment", "image_delta", "identity", "text_delta", "train.learning_rate", "train.prior_loss_weight"]
    head = next(line for line in table.splitlines() if "Experiment" in line)
    assert sorted(head.split()) == sorted(columns)
    assert sum("idea-number" in line for line in table.splitlines()) == 6
    assert max(map(len, table.splitlines())) <= 120
