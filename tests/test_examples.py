"""The examples run from beginning to end, in a copy of what they use."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def project(tmp_path):
    """A folder with the examples, and with the models and data of the repository."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def run(project, *arguments, **variables):
    settings = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    settings |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_program_learns_without_dvc(project):
    output = run(project, "examples/train_without_dvc.py", "data/concepts/cat", "out", "--steps", "2")
    assert "adapter and images: out" in output
    assert (project / "out/adapter/adapter.json").is_file()
    assert (project / "out/image-1.png").is_file()


@pytest.mark.slow
def test_the_notebook_runs(project):
    """Its cells one after another, as a kernel does, without needing one."""
    notebook = json.loads((project / "examples/quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (project / "examples/cells.py").write_text("\n\n".join(cells))
    run(project, "examples/cells.py", STEPS="2")
    assert (project / "build/my-cat/image-0.png").is_file()
