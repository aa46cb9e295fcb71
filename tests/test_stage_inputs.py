"""Inputs of stages: what masks and the masked loss add to those of `prepare` and `train`."""

import os

import pytest
from conftest import concept_values

from customdiff import stage_inputs
from customdiff.config import Params


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


def test_no_secret_of_an_address_is_an_input(tmp_path):
    """DVC stores the inputs in its cache and pushes them to its remotes."""
    address = "https://bob:S3cr3t@host.org/a.zip?token=S3cr3t"
    values = {
        "concepts": {"cat": concept_values() | {"source": {"url": address}}},
        "retrieve": {"backend": "service", "service": {"url": address}},
    }
    paths = stage_inputs.write_inputs(Params.model_validate(values), tmp_path / "inputs")
    text = "".join(path.read_text() for path in paths)
    assert "S3cr3t" not in text
    assert text.count("https://host.org/a.zip") == 2


def test_names_that_are_not_utf8_are_hashed(tmp_path):
    hashes = stage_inputs.FileHashes(tmp_path / "hashes.json")
    folder = os.fsencode(tmp_path) + b"/photos"
    os.mkdir(folder)
    open(folder + b"/\xff.png", "w").close()
    before = hashes.of(str(tmp_path / "photos"))
    os.rename(folder + b"/\xff.png", folder + b"/\xfe.png")
    assert hashes.of(str(tmp_path / "photos")) != before
    hashes.save()
