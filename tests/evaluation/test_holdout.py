"""Holdout photos are read and checked, and are the ceiling of the share of the way."""

import json

import numpy as np
import pytest
from conftest import concept_values
from PIL import Image
from stand_ins import Judge, plain

from customdiff.config import Concept, Download
from customdiff.errors import UserError
from customdiff.evaluation import holdout, scores
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import PairedMetric
from customdiff.evaluation.prompts import Prompt

INSTANCES = {"cat": [plain(0), plain(20)]}


def cos(degrees):
    return np.cos(np.radians(degrees))


@pytest.fixture
def read(tmp_path):
    """Reads a folder of holdout photos with these reds, and the captions of some."""

    def of(*reds, captions=(), limits=None, **photos):
        folder = tmp_path / "kept"
        folder.mkdir()
        for number, red in enumerate(reds):
            plain(red).save(folder / f"{number}.png")
        for number, text in enumerate(captions):
            (folder / f"{number}.txt").write_text(text)
        for name, image in photos.items():
            image.save(folder / f"{name}.png")
        concept = Concept.model_validate(concept_values() | {"holdout": str(folder)})
        return holdout.read("cat", concept, limits or Download(), INSTANCES["cat"])

    return of


def test_captions_lose_the_token_and_need_to_be_complete(read):
    found = read(30, 40, captions=["photo of a {} cat in the snow", "a <new1> cat"])
    assert [np.asarray(image)[0, 0, 0] for image in found.images] == [30, 40]
    assert found.captions == ["photo of a cat in the snow", "a cat"]


def test_some_captions_are_none(read):
    assert read(30, 40, captions=["a {} cat"]).captions == []


@pytest.mark.parametrize("reds", [(), (30,)])
def test_one_photo_is_too_few(read, reds):
    with pytest.raises(UserError, match=rf"^concepts\.cat\.holdout: .*kept has {len(reds)} photos"):
        read(*reds)


def test_a_missing_folder_is_named():
    concept = Concept.model_validate(concept_values() | {"holdout": "nowhere"})
    with pytest.raises(UserError, match=r"^concepts\.cat\.holdout: nowhere has 0 photos"):
        holdout.read("cat", concept, Download(), [])


def test_a_photo_that_was_trained_on_is_refused_by_name(read):
    with pytest.raises(UserError, match=r"^concepts\.cat\.holdout: .*1\.png is also an instance image"):
        read(30, 20)


def test_a_photo_is_compared_at_the_size_at_which_instance_images_are_stored(read, tmp_path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 80, 3), dtype=np.uint8))
    stored = large.resize((40, 80), Image.Resampling.LANCZOS)
    INSTANCES["cat"].append(stored)
    try:
        with pytest.raises(UserError, match="also an instance image"):
            read(30, limits=Download(max_side=80), large=large)
    finally:
        INSTANCES["cat"].pop()


def test_figures_of_the_photos_are_worked_by_hand():
    photos = {"cat": holdout.Holdout([plain(10), plain(50)], ["10", "90"])}
    found = holdout.figures(photos, INSTANCES, Judges(Judge(), Judge()))
    alignment = (cos(10) + cos(10) + cos(50) + cos(30)) / 4
    text = 2.5 * (cos(0) + cos(40)) / 2
    assert found == {
        "cat": pytest.approx({"image_alignment": alignment, "identity": alignment, "text_alignment": text})
    }


def summary(**further):
    pairs = [ImagePair(Prompt(text, ("cat",)), "0", 0, plain(90), plain(45)) for text in ("a {}", "b {}")]
    scored = scores.score_prompts(pairs, INSTANCES, Judges(Judge(), Judge()))
    return scores.summarize(scored, 2, resamples=100, seed=0, **further)


def test_the_holdout_is_the_ceiling_where_there_is_one():
    ceilings = scores.photo_ceilings(INSTANCES, Judges(Judge(), Judge()))
    kept = {"cat": {"image_alignment": 0.6, "identity": 0.9}}
    with_holdout, without = summary(ceilings=ceilings, holdout=kept), summary(ceilings=ceilings)
    base, adapter = (cos(90) + cos(70)) / 2, (cos(45) + cos(25)) / 2
    share, written = with_holdout.photo_share("cat"), json.loads(with_holdout.to_json())
    assert (share.name, share.metric, share.ceiling) == ("holdout_share", "identity", 0.9)
    assert share.value == pytest.approx((adapter - base) / (0.9 - base), abs=1e-5)
    assert written["holdout_share"] == written["concepts"]["cat"]["holdout_share"] == share.to_dict()
    assert written["concepts"]["cat"]["holdout"] == kept["cat"]
    assert "photo_share" not in written
    other = without.photo_share("cat")
    assert (other.name, other.ceiling) == ("photo_share", pytest.approx(cos(20), abs=1e-6))


def test_the_metric_is_image_alignment_where_identity_has_no_room():
    metrics = {
        "image_alignment": PairedMetric(0.2, 0.4, 0.2, 0.1, 0.3),
        "identity": PairedMetric(0.88, 0.89, 0.01, 0.0, 0.02),
    }
    kept = {"cat": {"image_alignment": 0.6, "identity": 0.9}}
    share = scores.Summary(metrics, {"cat": metrics}, 1, 1, holdout=kept).photo_share()
    assert (share.metric, share.value, share.low, share.high) == ("image_alignment", 0.5, 0.25, 0.75)


def test_one_concept_without_holdout_leaves_the_overall_share_to_the_instance_images():
    metrics = {"image_alignment": PairedMetric(0.2, 0.4, 0.2, 0.1, 0.3)}
    ceilings = {"cat": {"image_alignment": 0.7}, "pot": {"image_alignment": 0.7}}
    found = scores.Summary(
        metrics,
        dict.fromkeys(ceilings, metrics),
        1,
        1,
        ceilings=ceilings,
        holdout={"cat": {"image_alignment": 0.6}},
    )
    assert [found.photo_share(name).name for name in ("cat", "pot", None)] == [
        "holdout_share",
        "photo_share",
        "photo_share",
    ]
