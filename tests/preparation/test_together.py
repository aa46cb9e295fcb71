"""Views of two concepts side by side: cut-outs, places, captions, and what takes part."""

import numpy as np
import pytest
import torch
from conftest import concept_values, tiny_params
from diffusers import AutoencoderKL
from PIL import Image

from customdiff.config import Concept, Params
from customdiff.models import base
from customdiff.preparation import prepare, sheet
from customdiff.preparation.examples import Example
from customdiff.preparation.masks import SubjectMask
from customdiff.preparation.together import Company, Cutout, cut_out

RED, BLUE = (250, 0, 0), (0, 0, 250)
CAT = Concept.model_validate(concept_values())
POT = Concept.model_validate(concept_values("<new2>", "pot") | {"instance_prompt": "photo of a {} pot"})


def photo(folder, name, color, box=(20, 10, 50, 90), size=(100, 120)):
    """A white photo of a rectangle, saved, with its mask."""
    image, coverage = Image.new("RGB", size, "white"), np.zeros((size[1], size[0]), np.float32)
    image.paste(color, box)
    coverage[box[1] : box[3], box[0] : box[2]] = 1
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png")
    return folder / f"{name}.png", SubjectMask(coverage, "file")


def block(color, size=(30, 80)):
    return Cutout(Image.new("RGB", size, color), Image.new("L", size, 255))


def company():
    return Company(CAT, [(POT, [block(BLUE, (90, 30))])])


def test_a_cutout_is_the_box_of_the_mask(tmp_path):
    found = cut_out(*photo(tmp_path, "01", RED))
    assert found.image.size == found.coverage.size == (30, 80)
    assert found.image.getcolors() == [(30 * 80, RED)]
    assert np.asarray(found.coverage)[40, 15] == 255


@pytest.mark.parametrize("box", [(0, 10, 50, 90), (20, 0, 50, 90), (20, 10, 100, 90), (20, 10, 50, 120)])
def test_a_subject_that_the_photo_cuts_is_not_shown_beside_others(tmp_path, box):
    assert cut_out(*photo(tmp_path, "01", RED, box)) is None
    assert cut_out(tmp_path / "01.png", None) is None


def test_both_subjects_are_whole_in_their_halves_in_either_order():
    orders, named = set(), set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        image, coverage, caption = company().beside(block(RED), "white", 100, rng)
        pixels = np.asarray(image).astype(int)
        red, blue = pixels[..., 0] - pixels[..., 2] > 200, pixels[..., 2] - pixels[..., 0] > 200
        for subject, ratio in ((red, 30 / 80), (blue, 90 / 30)):
            rows, columns = np.nonzero(subject)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert subject[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
            assert width / height == pytest.approx(ratio, rel=0.12)
            assert (columns < 50).all() or (columns >= 50).all()
            assert rows.min() >= 10
            assert rows.max() < 90
        np.testing.assert_array_equal(coverage, (red | blue).astype(np.float32))
        orders.add(bool(np.nonzero(red)[1].mean() < 50))
        named.add(caption)
    assert orders == {True, False}
    assert named == {
        f"photo of a {first}{joint}{second} on a white background"
        for joint in (" and a ", " next to a ")
        for first, second in (("<new1> cat", "<new2> pot"), ("<new2> pot", "<new1> cat"))
    }


def test_the_views_follow_those_of_the_concept_alone_which_they_leave_as_they_are(tmp_path, tiny_base):
    params = tiny_params(tiny_base, prepare={"resolution": 32, "views": 3, "together": 4})
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    whole, cut = photo(tmp_path, "01", RED), photo(tmp_path, "02", RED, (0, 10, 50, 90))
    examples = [Example(path, "a <new1> cat", mask) for path, mask in (whole, cut)]
    alone = prepare.prepare_instances(examples, params.prepare, vae, [0])
    found = prepare.prepare_instances(examples, params.prepare, vae, [0], company=company())
    assert (len(alone), len(found)) == (6, 10)
    own = [0, 1, 2, 7, 8, 9]
    assert [found.captions[place] for place in own] == alone.captions
    torch.testing.assert_close(found.mean[own], alone.mean, rtol=0, atol=1e-5)
    assert all("<new2> pot" in caption for caption in found.captions[3:7])
    assert found.subject[3:7].amax() > 0.9


def test_company_is_what_other_concepts_can_be_cut_out(tmp_path, tiny_base):
    values = tiny_params(tiny_base).model_dump()
    values["concepts"] = {
        name: concept_values(f"<new{number}>", name) for number, name in enumerate(("cat", "dog", "pot"), 1)
    }
    folders = {"dog": tmp_path / "dog", "pot": tmp_path / "pot"}
    for name, box in (("dog", (20, 10, 50, 90)), ("pot", (0, 10, 50, 90))):
        path, mask = photo(folders[name], "01", RED, box)
        Image.fromarray(np.uint8(255 * mask.coverage)).save(path.with_suffix(".mask.png"))

    def found(**changes):
        params = Params.model_validate(values | {"prepare": values["prepare"] | changes})
        return Company.of(params, "cat", folders, torch.device("cpu"))

    company = found(together=1, masks="auto")
    assert company.concept.class_prompt == "cat"
    assert [(concept.class_prompt, len(cutouts)) for concept, cutouts in company.others] == [("dog", 1)]
    assert found(together=0, masks="auto") is None
    assert found(together=1, masks="none") is None


def test_the_sheet_shows_a_view_beside_another_concept(tmp_path):
    path, mask = photo(tmp_path, "01", RED)
    examples = [Example(path, "a <new1> cat", mask, {"white": "a <new1> cat on a white background"})]
    alone, found = sheet.contact_sheet(examples), sheet.contact_sheet(examples, company())
    assert found.width - alone.width == sheet.SIDE + sheet.GAP
    third = np.asarray(found)[:, 2 * (sheet.SIDE + sheet.GAP) : 3 * (sheet.SIDE + sheet.GAP)].astype(int)
    for low, high in ((0, 2), (2, 0)):
        assert (third[..., high] - third[..., low] > 150).any()
