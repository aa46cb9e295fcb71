"""The sheet shows every image in its place; the report holds the figures, and needs nothing beside it."""

from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from customdiff.config import Params
from customdiff.evaluation import report, scores
from customdiff.evaluation.scores import Pair, Prompt

GREEN, RED, BLUE = (0, 160, 0), (200, 0, 0), (0, 0, 200)
TEMPLATES = ("a {} on the grass", "a <script>alert(1)</script> {}")


def params(names=("tom",)):
    concepts = {
        name: {
            "source": {"path": "x"},
            "modifier_token": f"<new{number}>",
            "class_prompt": "cat",
            "instance_prompt": "photo of a {} cat",
        }
        for number, name in enumerate(names, 1)
    }
    return Params.model_validate({"concepts": concepts})


def picture(color, size=(64, 64)):
    return Image.new("RGB", size, color)


def pairs(names=("tom",), size=(64, 64), count=2):
    return [
        Pair(name, Prompt(template, "scene"), template.replace("{}", "cat"), i, picture(RED, size), picture(BLUE, size))
        for name in names
        for template in TEMPLATES
        for i in range(count)
    ]


def rows(names=("tom",), change=0.1):
    figures = {"base_text_alignment": 0.5, "text_alignment": 0.5 + change}
    figures |= {"base_image_alignment": 0.6, "image_alignment": 0.6 + 2 * change}
    deltas = {"text_alignment_delta": change, "image_alignment_delta": 2 * change}
    return [
        {"concept": name, "prompt": template, "kind": "scene", **figures, **deltas}
        for name in names
        for template in TEMPLATES
    ]


def page(names=("tom",), **changes):
    metrics = scores.summarize(rows(names), resamples=100, seed=0)
    metrics |= {"seconds": 1.0, "num_prompts": 2, "num_images": 4}
    sheet = report.contact_sheet(pairs(names), {name: [picture(GREEN)] for name in names}, params(names))
    config = {"base": {"model": "some/base", "revision": None, "variant": None}}
    return report.html(metrics, rows(names), sheet, params(names), config, **changes)


def where(sheet, color):
    """Bounding box (left, top, right, bottom) of a color."""
    ys, xs = np.nonzero((np.asarray(sheet) == color).all(axis=2))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def area(sheet, color):
    return int((np.asarray(sheet) == color).all(axis=2).sum())


def test_instances_lie_on_top_and_the_base_left_of_the_customized_images():
    sheet = report.contact_sheet(pairs(), {"tom": [picture(GREEN)] * 3}, params())
    instances, base, customized = (where(sheet, color) for color in (GREEN, RED, BLUE))
    assert instances[3] < base[1]
    assert base[2] < customized[0]
    assert (base[1], base[3]) == (customized[1], customized[3])
    side = 128  # twice the images' 64 px
    assert area(sheet, GREEN) == 3 * side * side
    assert area(sheet, RED) == area(sheet, BLUE) == 4 * side * side


@pytest.mark.parametrize(
    ("size", "side", "height"), [((512, 512), 192, 192), ((16, 16), 96, 96), ((512, 256), 192, 96)]
)
def test_images_of_any_size_fit_their_cells_in_proportion(size, side, height):
    sheet = report.contact_sheet(pairs(size=size, count=1), {"tom": [picture(GREEN)]}, params())
    assert area(sheet, RED) == 2 * side * height


def test_no_more_than_four_images_of_a_prompt_are_shown_and_instances_never_run_over_the_edge():
    sheet = report.contact_sheet(pairs(count=9), {"tom": [picture(GREEN)] * 50}, params())
    assert area(sheet, RED) == 2 * 4 * 128 * 128
    assert area(sheet, GREEN) % (128 * 128) == 0


def test_each_concept_has_its_part_of_the_sheet():
    names = ("tom", "pot")
    one = report.contact_sheet(pairs(), {"tom": [picture(GREEN)]}, params())
    both = report.contact_sheet(pairs(names), {name: [picture(GREEN)] for name in names}, params(names))
    assert both.height == 2 * one.height
    assert area(both, BLUE) == 2 * area(one, BLUE)


def test_two_concepts_in_one_picture_have_a_part_with_instances_of_both():
    names = ("tom", "pot")
    instances = {"tom": [picture(GREEN)], "pot": [picture("orange")]}
    sheet = report.contact_sheet([*pairs(names), *pairs(("tom and pot",))], instances, params(names))
    assert area(sheet, GREEN) == 2 * area(report.contact_sheet(pairs(names), instances, params(names)), GREEN)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_needs_nothing_beside_it_and_runs_no_script(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss,prior_loss\n1,0.5,0.2\n2,0.4,0.1\n")
    found = Page(page(steps=tmp_path / "steps.csv"))
    assert len(found.links) == 3
    assert all(link.startswith("data:image/") for link in found.links)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "url(" not in page()


def test_the_report_holds_figures_intervals_prompts_and_parameters():
    text = "".join(Page(page()).text)
    for expected in ("0.600", "0.800", "+0.100", "(95 % interval +0.200 to +0.200)", TEMPLATES[1], "some/base"):
        assert expected in text
    assert "learning_rate: 1.0e-05" in text
    assert "<new1> cat" in text


def test_figures_of_each_concept_are_shown_where_there_are_several():
    assert "Concepts" in Page(page(("tom", "pot"))).text
    assert "Concepts" not in Page(page()).text


@pytest.mark.parametrize("content", [None, "", "step,loss\n"])
def test_without_training_steps_the_curves_are_left_out(tmp_path, content):
    if content is not None:
        (tmp_path / "steps.csv").write_text(content)
    assert "Training" not in Page(page(steps=tmp_path / "steps.csv")).text


@pytest.mark.parametrize(
    ("delta", "interval", "expected"),
    [
        (0.1234, [0.1, 0.2], "Text alignment rises by 0.123 (95 % interval +0.100 to +0.200)."),
        (-0.02, [-0.04, -0.01], "Text alignment falls by 0.020 (95 % interval -0.040 to -0.010)."),
        (0.01, [-0.01, 0.03], "Text alignment does not change measurably (+0.010; 95 % interval -0.010 to +0.030)."),
    ],
)
def test_a_change_is_only_claimed_where_its_interval_leaves_zero_out(delta, interval, expected):
    metrics = {f"{name}_delta": delta for name in scores.FIGURES}
    metrics |= {f"{name}_delta_ci95": interval for name in scores.FIGURES}
    assert report.verdicts(metrics)[0] == expected


def test_the_running_mean_is_numpys():
    values = np.random.default_rng(0).normal(size=20)
    expected = np.convolve(values, np.ones(4) / 4, "valid")
    np.testing.assert_allclose(report.running_mean(values, 4)[3:], expected)
    np.testing.assert_allclose(report.running_mean(values, 4)[:3], [values[0], values[:2].mean(), values[:3].mean()])


def test_columns_of_steps_are_read_and_gaps_leave_their_column_out(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss,prior_loss\n1,0.5,\n2,0.4,0.1\n")
    assert report.read_steps(tmp_path / "steps.csv") == {"step": [1, 2], "loss": [0.5, 0.4]}


def test_charts_are_whole_svg_and_the_same_bytes_each_time():
    for draw in (lambda: report.alignment_plane(rows()), lambda: report.loss_curves({"loss": [0.5, 0.4]})):
        assert ElementTree.fromstring(draw()).tag.endswith("svg")
        assert draw() == draw()
