"""The figures of a checkpoint against numpy, by judges whose cosines are known."""

import numpy as np
import pytest
from conftest import tiny_params
from stand_ins import Judge, plain

from customdiff.evaluation import checkpoint_grader
from customdiff.evaluation.checkpoint_grader import CheckpointGrader
from customdiff.training.selection import Grade, Selection


def cosine(degrees):
    return np.cos(np.radians(degrees))


@pytest.fixture
def grader():
    photos = {"cat": Judge().images([plain(red) for red in (40, 60, 100)])}
    return CheckpointGrader(Judge(), Judge(), photos, {})


def test_the_ceiling_is_that_of_the_photos_without_themselves(grader):
    expected = np.mean([cosine(20), cosine(40), cosine(60)])
    assert grader.ceilings()["cat"] == pytest.approx(expected)
    assert CheckpointGrader(Judge(), Judge(), {"cat": grader.photos["cat"][:1]}, {}).ceilings() == {"cat": 1.0}


def test_figures_by_hand(grader):
    identity, text = grader.measure([plain(50), plain(90)], ["60", "100"], "cat")
    assert identity == pytest.approx(np.mean([cosine(a) for a in (10, 10, 50, 50, 30, 10)]))
    assert text == pytest.approx(2.5 * cosine(10))


def test_a_perfect_checkpoint_scores_one_and_the_base_model_zero(grader, tiny_base):
    """A checkpoint is as near to the photos as they are to one another, and its text as near as that of the base."""
    params = tiny_params(tiny_base, select="best")
    ceiling = grader.ceilings()["cat"]
    rows = [(0.1, 1.5), (ceiling, 1.5), (0.1, 1.5)]
    measured = [{"step": 2 * place, "concepts": {"cat": list(row)}} for place, row in enumerate(rows)]
    perfect, like_base = Selection(params, grader, measured).grades()
    assert perfect == Grade(2, ceiling, 1.5, 1.0, 1.0, 1.0)
    assert like_base.score == 0


def test_its_identity_changes_with_the_judges_and_the_code(tiny_base, tmp_path, monkeypatch):
    params = tiny_params(tiny_base)
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "model.safetensors").write_bytes(b"weights")
    own = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"clip": str(judge)})})
    before = checkpoint_grader.identity_of(own)
    assert before != checkpoint_grader.identity_of(params)
    assert before == checkpoint_grader.identity_of(own)
    (judge / "model.safetensors").write_bytes(b"others")
    assert before != checkpoint_grader.identity_of(own)
