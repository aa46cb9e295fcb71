"""Inputs of stages: what masks and the masked loss add to those of `prepare` and `train`."""

import pytest
import yaml
from conftest import concept_values

from customdiff import stage_inputs
from customdiff.config import Params
from customdiff.errors import UserError
from stages import inputs as inputs_stage


@pytest.fixture
def inputs(tmp_path):
    """Inputs of `prepare` and `train` for sections `prepare` and `train`."""
    segmenter = tmp_path / "segmenter"
    segmenter.mkdir()
    (segmenter / "config.json").write_text("{}")

    def of(prepare=None, train=None):
        values = {
            "concepts": {"cat": concept_values()},
            "prepare": {"segmenter": str(segmenter)} | (prepare or {}),
            "train": train or {},
        }
        params = Params.model_validate(values)
        hashes = stage_inputs.FileHashes(tmp_path / "hashes.json")
        return stage_inputs.prepare(params, params.concepts["cat"], hashes), stage_inputs.train(params, hashes)

    of.segmenter = segmenter
    return of


def test_prepare_depends_on_the_segmenter_if_masks_are_used(inputs):
    before, _ = inputs()
    without, _ = inputs({"masks": "none"})
    assert list(before["segmenter"]) == [str(inputs.segmenter)]
    assert without["segmenter"] == {}
    (inputs.segmenter / "config.json").write_text("{ }")
    assert inputs()[0]["segmenter"] != before["segmenter"]
    assert inputs({"masks": "none"})[0] == without
    named, _ = inputs({"masks": str(inputs.segmenter), "segmenter": "elsewhere"})
    assert list(named["segmenter"]) == [str(inputs.segmenter)]


def test_the_masked_loss_is_an_input_of_train_and_its_use_one_of_prepare(inputs):
    plain, half, quarter = (inputs(train={"mask_weight": weight}) for weight in (1.0, 0.5, 0.25))
    assert plain[0] != half[0] == quarter[0]
    assert plain[1] != half[1] != quarter[1]


def test_a_token_that_no_concept_has_stops_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"concepts": {"cat": concept_values()}, "evaluate": {"prompts": "prompts"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/default.txt").write_text("a {} beside a <new2> pot\n")
    with pytest.raises(UserError, match=r"default\.txt: line 1: names <new2>"):
        inputs_stage.main()
    assert not (tmp_path / "data").exists()
    (tmp_path / "prompts/default.txt").write_text("a {} beside a <new1> cat\n")
    inputs_stage.main()
    assert (tmp_path / "data/inputs/evaluate.json").is_file()
