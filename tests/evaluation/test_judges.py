"""Judges give their figures; a copied background earns nothing once subjects are cut out, and useless masks count."""

import json

import numpy as np
import pytest
from conftest import concept_values
from PIL import Image
from stand_ins import Judge, plain
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.evaluation import scores
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.judges import GREY, Cutouts, Judges, on_grey, parts_on_grey
from customdiff.evaluation.prompts import Prompt
from customdiff.models.clip import Clip

A, B, JOINT = Prompt("a {}", ("cat",)), Prompt("b {}", ("pot",)), Prompt("a {1} and a {2}", ("cat", "pot"))
CLASSES = {"cat": "black cat", "pot": "pot"}


class Marker:
    """Marks the right half of an image, or, if its red is 0 everywhere, nothing; notes the classes that it is told."""

    def __init__(self):
        self.told = []

    def masks(self, images, class_prompt):
        self.told.append(class_prompt)
        for image in images:
            pixels = np.asarray(image)
            mask = np.zeros(pixels.shape[:2], np.float32)
            mask[:, mask.shape[1] // 2 :] = pixels[..., 0].any()
            yield mask


class Blue:
    """Embeds an image at the angle that its mean blue names, in degrees."""

    def images(self, images):
        return Judge().images([Image.fromarray(np.asarray(image)[..., ::-1]) for image in images])


def halves(left, right):
    """An image whose halves have these reds."""
    image = plain(left)
    image.paste(plain(right, (4, 8)), (4, 0))
    return image


def test_a_subject_on_grey_is_composed_by_hand():
    coverage = np.zeros((8, 8), np.float32)
    coverage[2:6, 2:6] = 1
    coverage[3, 3] = 0.5
    found = np.asarray(on_grey(plain((10, 20, 30)), coverage)).astype(int)
    assert found[0, 0].tolist() == [128, 128, 128]
    assert found[4, 4].tolist() == [10, 20, 30]
    np.testing.assert_allclose(found[3, 3], [69, 74, 79], atol=1)
    assert on_grey(plain(5), np.zeros((8, 8), np.float32)) is None
    assert on_grey(plain(5), np.ones((8, 8), np.float32)) is None


def test_a_copied_background_earns_nothing_when_masked():
    judges = Judges(Judge(), cutouts=Cutouts(Marker(), CLASSES))
    photo, copied, right = halves(20, 60), halves(20, 10), halves(90, 60)
    pairs = [ImagePair(A, "0", 0, copied, right)]
    (found,) = scores.score_prompts(pairs, {"cat": [photo]}, judges)
    assert found.adapter["masked_image_alignment"] == pytest.approx(1, abs=1e-6)
    # means of red: the grey half has 128, the other 60 or 10
    assert found.base["masked_image_alignment"] == pytest.approx(np.cos(np.radians(25)), abs=1e-6)
    assert found.base["image_alignment"] == pytest.approx(np.cos(np.radians(25)), abs=1e-6)
    assert found.adapter["image_alignment"] < found.base["image_alignment"] < 1


def test_an_image_without_a_usable_mask_is_compared_whole_and_counted():
    cutouts = Cutouts(marker := Marker(), CLASSES)
    empty, whole = plain((0, 40, 0)), plain(80)
    first, second = cutouts.cut([empty, whole], "cat")
    assert np.array_equal(first, empty)
    assert np.asarray(second)[0, 0].tolist() == [128, 128, 128]
    assert (cutouts.whole, cutouts.total) == (1, 2)
    assert marker.told == ["black cat"]


def test_identity_is_the_mean_cosine_of_the_other_model():
    judges = Judges(Judge(), Blue())
    pairs = [ImagePair(A, "0", 0, plain((9, 0, 60)), plain((9, 0, 0))), ImagePair(B, "0", 0, plain(9), plain(9))]
    photos = {"cat": [plain((50, 0, 0)), plain((70, 0, 60))], "pot": [plain((0, 0, 30))]}
    first, second = scores.score_prompts(pairs, photos, judges)
    assert first.base["identity"] == pytest.approx((0.5 + 1) / 2, abs=1e-6)
    assert first.adapter["identity"] == pytest.approx((1 + 0.5) / 2, abs=1e-6)
    assert second.base["identity"] == pytest.approx(np.cos(np.radians(30)), abs=1e-6)
    assert scores.metrics_of([first, second]) == ("text_alignment", "image_alignment", "identity")


def test_two_concepts_in_one_image_are_each_cut_out_by_their_class():
    judges = Judges(Judge(), cutouts=Cutouts(marker := Marker(), CLASSES))
    pair = ImagePair(JOINT, "0", 0, halves(90, 60), halves(90, 60))
    (found,) = scores.score_prompts([pair], {"cat": [halves(0, 60)], "pot": [halves(0, 30)]}, judges)
    assert set(marker.told) == set(CLASSES.values())
    # the marked half, 4 x 8 px, stands on a square of 10 px: mean red 106.24; the photos' are (128 + 60) / 2 and 79
    cat, pot = np.cos(np.radians((106.24 - 94, 106.24 - 79)))
    assert found.base["masked_image_alignment"] == pytest.approx((cat + pot) / 2, abs=1e-5)
    assert found.each[0]["cat"]["masked_image_alignment"] == pytest.approx(cat, abs=1e-5)
    assert found.each[1]["pot"]["masked_image_alignment"] == pytest.approx(pot, abs=1e-5)


class Bright:
    """Marks all that is not black, whatever it is told."""

    def masks(self, images, class_prompt):
        return ((np.asarray(image)[..., 0] > 0).astype(np.float32) for image in images)


def two_subjects(left, right):
    """A black image with two squares, 4 px wide, of these reds."""
    image = plain(0, (16, 16))
    image.paste(plain(left, (4, 4)), (1, 2))
    image.paste(plain(right, (4, 4)), (10, 8))
    return image


def test_each_part_of_a_mask_stands_alone_on_grey():
    image = two_subjects(60, 200)
    coverage = (np.asarray(image)[..., 0] > 0).astype(np.float32)
    coverage[15, 0] = 1  # a speck: one pixel of 256 is less than half a per cent
    first, second = (np.asarray(part) for part in parts_on_grey(image, coverage))
    for part, red in ((first, 60), (second, 200)):
        expected = np.full((5, 5, 3), GREY[0])
        expected[:4, :4] = np.asarray(plain(red, (1, 1)))[0, 0]
        np.testing.assert_array_equal(part, expected)


def test_in_an_image_of_two_concepts_each_is_compared_with_the_part_most_like_it():
    judges = Judges(Judge(), Judge(), Cutouts(Bright(), CLASSES))
    pair = ImagePair(JOINT, "0", 0, two_subjects(60, 200), two_subjects(60, 60))

    def part(red):  # 16 of 25 pixels
        return (16 * red + 9 * 128) / 25

    photos = {"cat": [plain(round(part(60)))], "pot": [plain(round(part(200)))]}
    alone = [ImagePair(prompt, "0", 0, plain(60), plain(60)) for prompt in (A, B)]
    found, *others = scores.score_prompts([pair, *alone], photos, judges)
    base, adapter = found.each
    assert (base["cat"]["identity"], base["pot"]["identity"]) == pytest.approx((1, 1), abs=1e-3)
    apart = np.cos(np.radians(part(200) - part(60)))
    assert (adapter["cat"]["identity"], adapter["pot"]["identity"]) == pytest.approx((1, apart), abs=1e-2)
    summary = scores.summarize([found, *others], 6, resamples=10, seed=0)
    assert summary.each["cat+pot"]["pot"]["identity"].delta == pytest.approx(apart - 1, abs=1e-2)
    assert set(json.loads(summary.to_json())["concepts"]["cat+pot"]["each"]) == {"cat", "pot"}


def test_a_segmenter_that_does_not_know_the_class_is_refused_when_judges_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Clip, "load", lambda *_: Judge())
    four = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    config = SegformerConfig(**four, decoder_hidden_size=8)
    config.id2label = {0: "sky", 1: "tree"}
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)

    def load(name):
        concept = concept_values() | {"class_prompt": name}
        values = {"base": {"device": "cpu"}, "concepts": {"cat": concept}, "prepare": {"segmenter": str(tmp_path)}}
        return Judges.load(Params.model_validate(values))

    assert load("tree").alignments == ("image_alignment", "masked_image_alignment")
    with pytest.raises(UserError, match=r"^prepare\.segmenter: .*'cat'"):
        load("cat")


@pytest.mark.parametrize(
    ("prepare", "masked", "expected"),
    [
        ({}, None, "data/segmenter"),
        ({"segmenter": "mine"}, None, "mine"),
        ({"masks": "other/model"}, None, "other/model"),
        ({"masks": "none"}, None, None),
        ({"masks": "none", "segmenter": "mine"}, True, "mine"),
        ({"masks": "other/model"}, True, "other/model"),
        ({}, False, None),
    ],
)
def test_subjects_are_cut_out_by_the_segmenter_of_prepare(prepare, masked, expected):
    values = {"concepts": {"cat": concept_values()}, "prepare": prepare, "evaluate": {"masked": masked}}
    assert Params.model_validate(values).evaluation_segmenter == expected
