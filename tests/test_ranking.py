"""The benchmark of the figures: pictures differ in what they say, and rates are right for figures made by hand."""

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from benchmarks import ranking

RED, BLUE = (Image.new("RGBA", (20, 20), color).convert("RGBa") for color in ("red", "blue"))


def trial(seed=0):
    return ranking.trial(np.random.default_rng(seed), RED, BLUE)


def mask(image, color):
    pixels = np.asarray(image).astype(int)
    return (np.abs(pixels - color) < 3).all(axis=2)


def box(image, color=(255, 0, 0)):
    ys, xs = np.nonzero(mask(image, color))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def size(corners):
    return corners[2] - corners[0], corners[3] - corners[1]


def test_a_copied_background_is_that_of_the_first_photo_pixel_by_pixel():
    found = trial()
    photo, copied = (np.asarray(each) for each in (found.photos[0], found.pictures["copied"]))
    subject = mask(found.photos[0], (255, 0, 0))
    assert np.array_equal(subject, mask(found.pictures["copied"], (0, 0, 255)))
    assert np.array_equal(photo[~subject], copied[~subject])


def test_only_the_named_part_changes():
    pictures = trial().pictures
    right, background, larger, moved = (pictures[name] for name in ("right", "background", "size", "place"))
    assert box(right) == box(background)
    outside = ~mask(right, (255, 0, 0))
    assert (np.asarray(right)[outside] != np.asarray(background)[outside]).any()
    assert size(box(larger)) > size(box(right)) == size(box(moved))
    assert box(moved) != box(right)
    both = ~mask(right, (255, 0, 0)) & ~mask(moved, (255, 0, 0))
    assert np.array_equal(np.asarray(right)[both], np.asarray(moved)[both])


def red_share(images):
    """A figure made by hand: 0 or 60 degrees for a picture with or without the red individual."""
    degrees = np.array([0 if mask(image, (255, 0, 0)).any() else 60 for image in images])
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def test_values_rates_and_shifts_of_a_figure_that_sees_only_the_individual():
    found = ranking.values([trial(0), trial(1)], red_share)
    assert {name: each.tolist() for name, each in found.items()} == {
        "right": [1, 1],
        "wrong": pytest.approx([0.5, 0.5]),
        "copied": pytest.approx([0.5, 0.5]),
        "background": [1, 1],
        "size": [1, 1],
        "place": [1, 1],
    }
    assert {name: each.tolist() for name, each in ranking.rates(found).items()} == {"wrong": [1, 1], "copied": [1, 1]}
    assert ranking.shifts(found) == {"background": 0, "size": 0, "place": 0}


def test_rates_and_shifts_are_worked_by_hand():
    found = {"right": [0.9, 0.5], "wrong": [0.4, 0.6], "copied": [0.95, 0.6], "background": [0.7, 0.5]}
    found |= {"size": [0.9, 0.6], "place": [0.9, 0.5]}
    arrays = {name: np.array(each) for name, each in found.items()}
    assert {name: each.tolist() for name, each in ranking.rates(arrays).items()} == {"wrong": [1, 0], "copied": [0, 0]}
    # the gap is (0.5 - 0.1) / 2
    assert ranking.shifts(arrays) == pytest.approx({"background": 0.5, "size": 0.25, "place": 0})


def test_the_tables_replace_those_of_the_page(tmp_path):
    trials = {"unseen looks": ranking.draw_trials([[RED, BLUE]], 2, seed=0)}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    for _ in range(2):
        ranking.write(ranking.tables(trials, {"by hand": red_share}), page)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("before\n<!-- tables -->\nHow often")
    assert text.endswith("\n<!-- end of tables -->\nafter\n")
    assert "| by hand | " in text
    assert "<!-- end of tables -->" in ranking.PAGE.read_text()
    assert ranking.PAGE.is_relative_to(ROOT / "docs")
