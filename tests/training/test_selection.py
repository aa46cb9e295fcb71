"""The checkpoint that becomes the adapter: its score by hand, and runs whose grades depend on their images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import concept_values, tiny_params, write_prepared
from pydantic import ValidationError

from customdiff.adapters import adapter
from customdiff.config import Train
from customdiff.errors import UserError
from customdiff.evaluation.prompts import Prompt, check_grading_prompts
from customdiff.files import sha256
from customdiff.tracking import Tracker
from customdiff.training import launch, selection, trainer
from customdiff.training.checkpoints import score_of
from customdiff.training.identity import run_identity

GRADING = {"prompts": ["a {} on red", "the {}"], "steps": 1, "guidance_scale": 1.0, "tolerance": 0.0}


class ByPixels:
    """Measures of images that differ with every bit of them; records what it is asked."""

    def __init__(self, figures=None):
        self.identity = {"judges": ["pixels"]}
        self.figures = iter(figures) if figures else None
        self.asked = []

    def ceilings(self):
        return {"cat": 1.0, "dog": 1.0}

    def measure(self, images, prompts, concept):
        self.asked.append((concept, list(prompts)))
        if self.figures:
            return next(self.figures)
        pixels = np.stack([np.asarray(image, np.float64) for image in images])
        return pixels.mean() % 7 / 7, 1 + pixels.std() % 1


def run(params, tmp_path, grader, name="runs", tracker=None):
    prepared = tmp_path / "prepared"
    if not prepared.exists():
        write_prepared(prepared, params)
    return trainer.run(params, prepared, tmp_path / name, lambda run_id: tracker or Tracker(), grader)


def weights(folder):
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def test_shares_by_hand():
    assert selection.shares(0.5, 1.2, base=(0.2, 1.5), ceiling=0.8) == pytest.approx((0.5, 0.8))
    assert selection.shares(0.1, 1.6, base=(0.2, 1.5), ceiling=0.8) == (0.0, 1.0)  # no share is above 1 or negative
    assert selection.shares(0.9, 0.3, base=(0.2, 0.0), ceiling=0.8) == (1.0, 1.0)


# base, then checkpoints 2, 4, 6: with the base at (0, 1) and the photos at 1 each figure is its own share
FIGURES = [(0.0, 1.0), (0.5, 0.8), (0.6, 0.9), (0.7, 0.5)]


def test_the_best_checkpoint_becomes_the_adapter(tiny_base, tmp_path):
    params = tiny_params(tiny_base, select="best", checkpoints_total_limit=1, grading=GRADING)
    grader = ByPixels(FIGURES)
    best = run(params, tmp_path, grader)
    assert [path.name for path in best.checkpoints()] == ["step-000004", "step-000006"]
    assert weights(best.path / "adapter") == weights(best.path / "step-000004")
    assert adapter.read_config(best.path / "adapter").steps == 4
    found = best.metrics()
    assert found["selected_step"] == 4
    assert found["selected_score"] == pytest.approx(2 / (1 / 0.6 + 1 / 0.9), abs=1e-6)
    assert [grade["step"] for grade in found["grades"]] == [2, 4, 6]
    scores = [grade["score"] for grade in found["grades"]]
    assert [score_of(path) for path in best.checkpoints()] == scores[1:]
    assert grader.asked == [("cat", ["a cat on red", "the cat"])] * 4  # no modifier token reaches the judge


def test_grading_does_not_change_the_training(tiny_base, tmp_path):
    plain = run(tiny_params(tiny_base), tmp_path, None, "plain")
    graded = run(tiny_params(tiny_base, patience=9, grading=GRADING), tmp_path, ByPixels(), "graded")
    assert weights(plain.path / "adapter") == weights(graded.path / "adapter")
    assert (plain.path / "steps.csv").read_text() == (graded.path / "steps.csv").read_text()


def test_weights_of_the_score_decide(tiny_base, tmp_path):
    grading = GRADING | {"identity_weight": 1.0, "text_weight": 0.0}
    params = tiny_params(tiny_base, select="best", grading=grading)
    assert run(params, tmp_path, ByPixels(FIGURES)).metrics()["selected_step"] == 6


@pytest.mark.parametrize(("tolerance", "selected"), [(0.0, 4), (0.1, 8), (0.05, 6), (1.0, 8)])
def test_the_latest_of_nearly_equal_scores_is_selected(tiny_base, tmp_path, tolerance, selected):
    figures = [(0.0, 1.0), (0.5, 0.5), (0.9, 0.9), (0.86, 0.86), (0.82, 0.82)]
    params = tiny_params(tiny_base, select="best", max_steps=8, grading=GRADING | {"tolerance": tolerance})
    found = run(params, tmp_path, ByPixels(figures))
    assert found.metrics()["selected_step"] == selected
    assert weights(found.path / "adapter") == weights(found.path / f"step-{selected:06d}")


@pytest.mark.parametrize(("select", "selected"), [("best", 2), ("last", 6)])
def test_patience_stops_a_training(tiny_base, tmp_path, select, selected):
    figures = [(0.0, 1.0), (0.5, 0.8), (0.4, 0.8), (0.4, 0.8), (0.9, 0.9)]
    params = tiny_params(tiny_base, select=select, patience=2, max_steps=12, grading=GRADING)
    stopped = run(params, tmp_path, ByPixels(figures))
    assert len((stopped.path / "steps.csv").read_text().splitlines()) == 1 + 6
    assert stopped.metrics()["selected_step"] == selected
    assert adapter.read_config(stopped.path / "adapter").steps == selected
    assert weights(stopped.path / "adapter") == weights(stopped.path / f"step-{selected:06d}")


def test_several_concepts_are_graded_by_their_mean(tiny_base, tmp_path):
    concepts = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
    params = tiny_params(tiny_base, concepts=concepts, max_steps=2, select="best", grading=GRADING)
    figures = [(0.0, 1.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    (grade,) = run(params, tmp_path, ByPixels(figures)).metrics()["grades"]
    assert (grade["identity_share"], grade["text_share"], grade["score"]) == (0.75, 0.75, 0.75)


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_killed_run_continues_to_the_same_choice(tiny_base, tmp_path, at):
    """Whether it was killed before the grade of a checkpoint was measured, or after the checkpoint was written."""
    params = tiny_params(tiny_base, select="best", patience=5, checkpoints_total_limit=1, grading=GRADING)
    whole = run(params, tmp_path, ByPixels(), "whole")

    class Killed(ByPixels):
        def measure(self, images, prompts, concept):
            if len(self.asked) == at // 2:
                raise KeyboardInterrupt
            return super().measure(images, prompts, concept)

    with pytest.raises(KeyboardInterrupt):
        run(params, tmp_path, Killed(), "killed")
    continued = run(params, tmp_path, ByPixels(), "killed")
    for name in ("adapter", *(path.name for path in whole.checkpoints())):
        assert weights(continued.path / name) == weights(whole.path / name)
    same = ("selected_step", "selected_score", "grades")
    assert {name: continued.metrics()[name] for name in same} == {name: whole.metrics()[name] for name in same}


def test_a_checkpoint_without_its_grade_is_graded_when_the_run_continues(tiny_base, tmp_path, monkeypatch):
    """A signal at a checkpoint saves it before it is graded."""
    params = tiny_params(tiny_base, select="best", grading=GRADING)
    whole = run(params, tmp_path, ByPixels(), "whole")
    with monkeypatch.context() as patched:
        patched.setattr(selection.Selection, "is_due", lambda self, step: step == 0)
        partial = run(params, tmp_path, ByPixels(), "killed")
    for path in [partial.path / "complete", partial.path / "step-000004", partial.path / "step-000006"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    continued = run(params, tmp_path, ByPixels(), "killed")
    assert continued.metrics()["grades"] == whole.metrics()["grades"]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_checkpoint(tiny_base, tmp_path, monkeypatch):
    """Only the main process grades; the other one waits for its grade, and stops with it."""
    options = {"select": "best", "patience": 1, "max_steps": 8, "launch": {"num_processes": 2}}
    params = tiny_params(tiny_base, grading=GRADING, **options)
    write_prepared(tmp_path / "prepared", params)
    (tmp_path / "params.json").write_text(params.model_dump_json())
    (tmp_path / "two.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_selection import ByPixels\n"
        "from pathlib import Path\n"
        "from customdiff.training import trainer\n"
        "from customdiff.config import Params\n"
        "from customdiff.tracking import Tracker\n"
        "params = Params.model_validate_json(Path('params.json').read_text())\n"
        "grader = ByPixels([(0.0, 1.0), (0.5, 0.8), (0.4, 0.8)])\n"
        "trainer.run(params, Path('prepared'), Path('two'), lambda run_id: Tracker(), grader)\n"
    )
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        launch.command(params.train, "two.py"), check=True, env=environment, capture_output=True, timeout=300
    )
    (two,) = (tmp_path / "two").iterdir()
    assert len((two / "steps.csv").read_text().splitlines()) == 1 + 4
    assert json.loads((two / "metrics.json").read_text())["selected_step"] == 2


def test_grades_are_tracked_with_pictures(tiny_base, tmp_path):
    logged, images = {}, []

    class Recorder(Tracker):
        def metrics(self, values, step=None):
            logged.setdefault(step, {}).update(values)

        def image(self, image, name, step):
            images.append((step, name))

    params = tiny_params(tiny_base, select="best", grading=GRADING)
    found = run(params, tmp_path, ByPixels(FIGURES), tracker=Recorder()).metrics()
    assert [logged[step]["grade/score"] for step in (2, 4, 6)] == [grade["score"] for grade in found["grades"]]
    assert (0, "grade/a cat on red (1)") in images
    assert (6, "grade/a <new1> cat on red (1)") in images


def test_only_graded_runs_depend_on_the_grader(tiny_base, tmp_path):
    plain = tiny_params(tiny_base)
    prepared = write_prepared(tmp_path / "prepared", plain)
    assert run_identity(plain, prepared, 1) == run_identity(tiny_params(tiny_base, grading=GRADING), prepared, 1)
    best, grader = tiny_params(tiny_base, select="best", grading=GRADING), ByPixels()
    before = run_identity(best, prepared, 1, grader)
    grader.identity = {"judges": ["others"]}
    assert run_identity(best, prepared, 1, grader) != before
    with pytest.raises(ValueError, match="need a grader"):
        run_identity(best, prepared, 1)


@pytest.mark.parametrize(
    ("grading", "message"),
    [
        ({"prompts": ["a cat"]}, r"no \{\} for the subject"),
        ({"prompts": []}, "at least 1 item"),
        ({"identity_weight": 0.0, "text_weight": 0.0}, "both 0"),
    ],
)
def test_unusable_settings_are_refused(grading, message):
    with pytest.raises(ValidationError, match=message):
        Train(grading=grading)


def test_an_unknown_token_in_a_grading_prompt_is_refused(tiny_base):
    with pytest.raises(ValidationError, match=r"train\.grading\.prompts: .*<new9>"):
        tiny_params(tiny_base, grading={"prompts": ["a {} beside <new9>"]})


def test_evaluation_prompts_may_not_grade_checkpoints():
    prompts = [Prompt("a {} on red", ("cat",), "scene")]
    check_grading_prompts(["a {} on blue"], prompts)
    with pytest.raises(UserError, match=r"train\.grading\.prompts: 'a \{\} on red'"):
        check_grading_prompts(["a {} on blue", "a {} on red"], prompts)
