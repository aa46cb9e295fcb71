"""The sheet shows every image in its place; the report holds the metrics, and needs nothing beside it."""

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import concept_values
from PIL import ImageFont
from stand_ins import plain, score

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Params
from customdiff.evaluation import report, scores
from customdiff.evaluation.generation import ImagePair
from customdiff.evaluation.metrics import PairedMetric
from customdiff.evaluation.prompts import Prompt

GREEN, RED, BLUE, ORANGE = (0, 160, 0), (200, 0, 0), (0, 0, 200), (255, 165, 0)
TEMPLATES = ("a {} on the grass", "a <script>alert(1)</script> {}")
TOM, BOTH = (("tom",),), (("tom",), ("pot",))


def params(groups=TOM):
    names = dict.fromkeys(name for group in groups for name in group)
    concepts = {name: concept_values(f"<new{number}>") for number, name in enumerate(names, 1)}
    return Params.model_validate({"concepts": concepts})


def pairs(groups=TOM, size=(64, 64), count=2):
    return [
        ImagePair(Prompt(template, names, "scene"), template, number, plain(RED, size), plain(BLUE, size))
        for names in groups
        for template in TEMPLATES
        for number in range(count)
    ]


def scored(groups=TOM):
    return [
        score(Prompt(template, names, "scene"), (0.5, 0.6), (0.6, 0.8)) for names in groups for template in TEMPLATES
    ]


def sheet_of(groups=TOM, instances=1, **kind):
    photos = {name: [plain(GREEN)] * instances for group in groups for name in group}
    return np.asarray(report.contact_sheet(pairs(groups, **kind), photos, params(groups).concepts))


def page(groups=TOM, **changes):
    summary = scores.summarize(scored(groups), 4, resamples=100, seed=0)
    config = AdapterConfig.model_validate(
        {"base": {"model": "some/base"}, "concepts": {"tom": concept_values("<new1>")}}
    )
    return report.html(summary, scored(groups), plain(GREEN), params(groups), config, **changes)


def box(sheet, color):
    """Bounding box (left, top, right, bottom) of a color."""
    ys, xs = np.nonzero((sheet == color).all(axis=2))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def area(sheet, color):
    return int((sheet == color).all(axis=2).sum())


def test_instance_images_are_on_top_and_the_base_model_left_of_the_adapter():
    sheet = sheet_of(instances=3)
    instances, base, customized = (box(sheet, color) for color in (GREEN, RED, BLUE))
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
    assert area(sheet_of(size=size, count=1), RED) == 2 * side * height


def test_at_most_four_images_of_a_prompt_and_all_instance_images_are_shown():
    for count in (1, 9):
        sheet = sheet_of(count=count, instances=17)
        assert area(sheet, RED) == 2 * min(count, 4) * 128 * 128
        assert area(sheet, GREEN) == 17 * 128 * 128


def test_titles_of_columns_do_not_meet():
    names = {"tom": concept_values("<a-very-long-token>") | {"class_prompt": "grey cat with a red collar"}}
    concepts = Params.model_validate({"concepts": names}).concepts
    sheet = report.contact_sheet(pairs(count=1), {"tom": [plain(GREEN)]}, concepts)
    font = ImageFont.load_default(15)
    assert sheet.width > 220 + 2 * font.getlength("grey cat with a red collar") + font.getlength("<a-very-long-token>")


def test_each_concept_has_its_part_of_the_sheet():
    one, both = sheet_of(), sheet_of(BOTH)
    assert both.shape[0] == 2 * one.shape[0]
    assert area(both, BLUE) == 2 * area(one, BLUE)


def test_two_concepts_in_one_image_have_a_part_with_instance_images_of_both():
    groups = (*BOTH, ("tom", "pot"))
    photos = {"tom": [plain(GREEN)], "pot": [plain(ORANGE)]}
    sheet = np.asarray(report.contact_sheet(pairs(groups), photos, params(BOTH).concepts))
    assert area(sheet, GREEN) == area(sheet, ORANGE) == 2 * 128 * 128
    assert area(sheet, RED) == 3 * area(sheet_of(), RED)


def test_a_grid_has_a_row_per_text_and_a_column_per_model_and_leaves_gaps_white():
    rows = [("a", {"one": plain(RED), "two": plain(BLUE)}), ("b", {"two": plain(ORANGE)})]
    grid = np.asarray(report.image_grid(rows, ["one", "two"]))
    red, blue, orange = (box(grid, color) for color in (RED, BLUE, ORANGE))
    assert area(grid, RED) == 96 * 96
    assert red[1] == blue[1]
    assert red[2] < blue[0] == orange[0]
    assert blue[3] < orange[1]
    assert (grid[orange[1] : orange[3], red[0] : red[2]] == 255).all()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_needs_nothing_beside_it_and_runs_no_script(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss,prior_loss\n1,0.5,0.2\n2,0.4,0.1\n")
    text = page(steps=tmp_path / "steps.csv")
    found = Page(text)
    assert len(found.links) == 3
    assert all(link.startswith("data:image/") for link in found.links)
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert "url(" not in text


def test_the_report_has_metrics_intervals_prompts_and_parameters():
    text = "".join(Page(page()).words)
    for expected in ("0.600", "0.800", "+0.100", "+0.200 to +0.200", TEMPLATES[1], "some/base", "<new1> cat"):
        assert expected in text
    assert "learning_rate: 1.0e-05" in text


def test_metrics_of_each_concept_are_shown_where_there_are_several():
    words = Page(page((*BOTH, ("tom", "pot")))).words
    assert "Concepts" in words
    assert {"tom", "pot", "tom+pot"} <= set(words)
    assert "Concepts" not in Page(page()).words


@pytest.mark.parametrize("content", [None, "", "step,loss\n"])
def test_without_training_steps_the_curves_are_left_out(tmp_path, content):
    if content is not None:
        (tmp_path / "steps.csv").write_text(content)
    assert len(Page(page(steps=tmp_path / "steps.csv")).links) == 2
    assert len(Page(page()).links) == 2


@pytest.mark.parametrize(
    ("delta", "interval", "verb"),
    [
        (0.1234, (0.1, 0.2), "rises by 0.123 "),
        (-0.02, (-0.04, -0.01), "falls by 0.020 "),
        (0.01, (-0.01, 0.03), "not change measurably"),
        (0.01, (0.0, 0.03), "not change measurably"),
    ],
)
def test_a_change_is_claimed_only_where_its_interval_excludes_zero(delta, interval, verb):
    metric = PairedMetric(0.5, 0.5 + delta, delta, *interval)
    summary = scores.Summary(dict.fromkeys(scores.METRICS[:2], metric), {}, 2, 4)
    text, image = report.changes(summary)
    assert verb in text
    assert f"{interval[0]:+.3f} to {interval[1]:+.3f}" in text
    assert (text.lower().startswith("text alignment"), image.lower().startswith("image alignment")) == (True, True)


def test_one_image_makes_no_finding():
    metric = PairedMetric(0.5, 0.6, 0.1, 0.1, 0.1)
    (text,) = report.changes(scores.Summary({"text_alignment": metric}, {"cat": {"text_alignment": metric}}, 1, 1))
    assert "+0.100" in text
    assert "no interval" in text
    assert "rises" not in text


def test_the_running_mean_is_numpys():
    values = np.random.default_rng(0).normal(size=20)
    expected = np.convolve(values, np.ones(4) / 4, "valid")
    np.testing.assert_allclose(report.running_mean(values, 4)[3:], expected)
    np.testing.assert_allclose(report.running_mean(values, 4)[:3], [values[0], values[:2].mean(), values[:3].mean()])


def test_a_column_of_steps_with_gaps_is_left_out(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss,prior_loss\n1,0.5,\n2,0.4,0.1\n")
    assert report.read_steps(tmp_path / "steps.csv") == {"step": [1, 2], "loss": [0.5, 0.4]}


def test_charts_are_whole_svg_and_the_same_bytes_each_time():
    for draw in (lambda: report.alignment_plane(scored()), lambda: report.loss_curves({"loss": [0.5, 0.4]})):
        assert ElementTree.fromstring(draw()).tag.endswith("svg")
        assert draw() == draw()


def test_the_photos_with_masks_and_captions_are_part_of_the_page(tmp_path):
    plain(BLUE).save(tmp_path / "sheet.jpg")
    encoded = base64.b64encode((tmp_path / "sheet.jpg").read_bytes()).decode()
    assert encoded in page(photos=[tmp_path / "sheet.jpg", tmp_path / "missing.jpg"])
    assert "<h2>Photos</h2>" not in page()
