"""The contact sheet and the report of an evaluation; the report is one self-contained HTML file."""

import base64
import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import yaml
from PIL import Image, ImageDraw, ImageFont

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept, Params
from customdiff.evaluation.generation import ImagePair, class_subject, customized_subject
from customdiff.evaluation.meanings import table, title_of
from customdiff.evaluation.scores import PromptScore, Summary, metrics_of
from customdiff.evaluation.verdict import Verdict
from customdiff.images import save_sheet
from customdiff.redaction import redact_values

TEMPLATES = Path(__file__).parent / "templates"
INK, FAINT, BASE, CUSTOMIZED = "#1f2430", "#7a8194", "#9aa3b5", "#2f6fde"
IMAGES_PER_PROMPT = 4  # on the sheet; the files hold all
GAP, LABEL_WIDTH = 6, 220  # px
PLANE = ("text_alignment", "image_alignment")  # axes of the paper's figure
EXTREMES = 3  # best and worst prompts


def contact_sheet(
    pairs: Sequence[ImagePair],
    instances: Mapping[str, Sequence[Image.Image]],
    concepts: Mapping[str, Concept],
) -> Image.Image:
    """All prompts at a glance: instance images on top, then one row per prompt, base model beside customized.

    Args:
        pairs: of all concepts, in order.
        instances: instance images by concept.
        concepts: for the words above the columns.
    """
    groups: dict[tuple[str, ...], list[ImagePair]] = {}
    for pair in pairs:
        groups.setdefault(pair.prompt.concepts, []).append(pair)
    sections = []
    for names, group in groups.items():
        # for several concepts in one image: instance images of each in turn
        shown = [image for images in zip(*(instances[name] for name in names), strict=False) for image in images]
        sections.append(_section(group, shown, {name: concepts[name] for name in names}))
    sheet = Image.new("RGB", (max(s.width for s in sections), sum(s.height for s in sections)), "white")
    top = 0
    for section in sections:
        sheet.paste(section, (0, top))
        top += section.height
    return sheet


def _section(
    pairs: Sequence[ImagePair], instances: Sequence[Image.Image], concepts: Mapping[str, Concept]
) -> Image.Image:
    """The part of the contact sheet about one concept, or about several in one image."""
    rows: dict[str, list[ImagePair]] = {}
    for pair in pairs:
        rows.setdefault(pair.prompt.template, []).append(pair)
    columns = min(IMAGES_PER_PROMPT, max(map(len, rows.values())))
    side = _cell_side(pairs[0].base)
    titles = [
        ("base model", " and ".join(map(class_subject, concepts.values()))),
        ("customized", " and ".join(map(customized_subject, concepts.values()))),
    ]
    block = max(columns * (side + GAP), *(_title_width(*title) + 2 * GAP for title in titles))
    left, right = LABEL_WIDTH, LABEL_WIDTH + block + 3 * GAP
    width = right + block + GAP
    per_row = (width - LABEL_WIDTH) // (side + GAP)
    photo_rows = -(-len(instances) // per_row)
    head, line = 2 * GAP, 30
    first_row = head + photo_rows * (side + GAP) + 2 * line
    sheet = Image.new("RGB", (width, first_row + len(rows) * (side + GAP) + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)

    _label(draw, (2 * GAP, head), side, " and ".join(concepts), "instance images")
    for number, image in enumerate(instances):
        row, column = divmod(number, per_row)
        sheet.paste(_cell(image, side), (left + column * (side + GAP), head + row * (side + GAP)))
    for x, (title, words) in zip((left, right), titles, strict=True):
        draw.text((x, first_row - line), title, INK, _font(17))
        offset = draw.textlength(f"{title}  ", _font(17))
        draw.text((x + offset, first_row - line + 1), words, FAINT, _font(15))
    for row, generated in enumerate(rows.values()):
        top = first_row + row * (side + GAP)
        _label(draw, (2 * GAP, top), side, generated[0].text, generated[0].prompt.kind)
        for column, pair in enumerate(generated[:columns]):
            sheet.paste(_cell(pair.base, side), (left + column * (side + GAP), top))
            sheet.paste(_cell(pair.customized, side), (right + column * (side + GAP), top))
    return sheet


def _title_width(title: str, words: str) -> int:
    """Width of a title and the fainter words behind it, px."""
    return round(_font(17).getlength(f"{title}  ") + _font(15).getlength(words))


def image_grid(rows: Sequence[tuple[str, Mapping[str, Image.Image]]], columns: Sequence[str]) -> Image.Image:
    """Images in a table: one row per text, one column per model; a missing image is white."""
    side = _cell_side(next(iter(rows[0][1].values())))
    head = 40
    sheet = Image.new("RGB", (LABEL_WIDTH + len(columns) * (side + GAP), head + len(rows) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        words = textwrap.wrap(name.replace("_", " "), max(6, side // 8), max_lines=2, placeholder="...")
        for line, word in enumerate(words):
            draw.text((LABEL_WIDTH + column * (side + GAP), 4 + 16 * line), word, INK, _font(14))
    for row, (text, images) in enumerate(rows):
        top = head + row * (side + GAP)
        _label(draw, (2 * GAP, top), side, text, "")
        for column, name in enumerate(columns):
            if name in images:
                sheet.paste(_cell(images[name], side), (LABEL_WIDTH + column * (side + GAP), top))
    return sheet


def _label(draw: ImageDraw.ImageDraw, corner: tuple[int, int], side: int, text: str, note: str) -> None:
    """Draw a text and a fainter note below it, wrapped and centred beside a row of images."""
    lines = textwrap.wrap(text, 25, max_lines=max(1, (side - 24) // 20), placeholder=" ...") or [""]
    x, y = corner[0], corner[1] + (side - 20 * len(lines) - 18) // 2
    for number, line in enumerate(lines):
        draw.text((x, y + 20 * number), line, INK, _font(15))
    draw.text((x, y + 20 * len(lines) + 1), note, FAINT, _font(13))


def _cell_side(image: Image.Image) -> int:
    """Side of a cell, px: twice the size of small images, at most 192."""
    return max(96, min(192, 2 * max(image.size)))


def _cell(image: Image.Image, side: int) -> Image.Image:
    """An image fitted into a square of `side` px on white."""
    scale = side / max(image.size)
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    fitted = image.convert("RGB").resize([max(1, round(scale * length)) for length in image.size], method)
    cell = Image.new("RGB", (side, side), "white")
    cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return cell


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def html(
    summary: Summary,
    scores: Sequence[PromptScore],
    sheet: Image.Image,
    params: Params,
    adapter_config: AdapterConfig,
    steps: Path | None = None,
    photos: Sequence[Path] = (),
    verdicts: Sequence[Verdict] = (),
    controls: Image.Image | None = None,
) -> str:
    """The report: verdicts, figures in words, curves, contact sheet, table of prompts, parameters.

    One file, no scripts.

    Args:
        summary: the contents of metrics.json.
        scores: one per prompt.
        sheet: the contact sheet, embedded as JPEG.
        params: shown as YAML, without the secrets of addresses.
        adapter_config: of the adapter that was evaluated.
        steps: CSV with one row per training step (results/train/steps.csv); left out where it does not exist.
        photos: JPEG sheets of instance images with masks and captions (data/prepared/<concept>/sheet.jpg).
        verdicts: one per concept, shown at the top.
        controls: images without the token; see `drift.strip`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    curves = read_steps(steps) if steps else {}
    return environment.get_template("report.html").render(
        summary=summary,
        concepts=params.concepts,
        metrics=metrics_of(scores),
        figures=table(summary),
        best=ranked(scores)[:EXTREMES],
        worst=ranked(scores)[: -EXTREMES - 1 : -1],
        controls=_data_uri(_jpeg(controls), "image/jpeg") if controls else None,
        verdicts=verdicts,
        scores=scores,
        sheet=_data_uri(_jpeg(sheet), "image/jpeg"),
        photos=[_data_uri(path.read_bytes(), "image/jpeg") for path in photos if path.is_file()],
        plane=_data_uri(alignment_plane(scores), "image/svg+xml"),
        curves=_data_uri(loss_curves(curves), "image/svg+xml") if curves else None,
        adapter=adapter_config,
        settings=params.evaluate,
        parameters=yaml.safe_dump(redact_values(params.model_dump()), sort_keys=False, allow_unicode=True),
    )


def changes(summary: Summary) -> list[str]:
    """One sentence per metric, for the terminal; one image, or an interval that includes zero, shows no change."""
    sentences = []
    for name, metric in summary.overall.items():
        interval = f"95 % interval {metric.delta_low:+.3f} to {metric.delta_high:+.3f}"
        if summary.num_images <= len(summary.concepts):
            sentences.append(f"{title_of(name)} changes by {metric.delta:+.3f} (one image has no interval).")
        elif metric.delta_low <= 0 <= metric.delta_high:
            sentences.append(f"{title_of(name)} does not change measurably ({metric.delta:+.3f}; {interval}).")
        else:
            verb = "rises" if metric.delta > 0 else "falls"
            sentences.append(f"{title_of(name)} {verb} by {abs(metric.delta):.3f} ({interval}).")
    return sentences


def ranked(scores: Sequence[PromptScore]) -> list[PromptScore]:
    """Scores from best to worst prompt: by the mean of its ranks in text alignment and in similarity to the photos.

    The similarity is identity, else the masked image alignment, else image alignment.
    """
    names = metrics_of(scores)
    subject = next(name for name in ("identity", "masked_image_alignment", "image_alignment") if name in names)

    def rank(score: PromptScore) -> int:
        values = [(name, score.adapter[name]) for name in ("text_alignment", subject)]
        return sum(other.adapter[name] > value for name, value in values for other in scores)

    return sorted(scores, key=rank)


def read_steps(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV of steps; empty if the file does not exist or has no steps."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return {}
    return {name: [float(row[name]) for row in rows] for name in rows[0] if name and all(row[name] for row in rows)}


def loss_curves(columns: Mapping[str, Sequence[float]]) -> bytes:
    """SVG of the losses over steps: single steps faint, and their running mean over a twentieth of the run."""
    names = [name for name in ("loss", "instance_loss", "prior_loss") if name in columns]
    steps = columns.get("step") or range(1, len(columns[names[0]]) + 1)
    figure, axes = _figure(5.6, 3.4)
    for name, color in zip(names, (INK, CUSTOMIZED, "#d9822b"), strict=False):
        values = columns[name]
        axes.plot(steps, values, color=color, alpha=0.18, linewidth=0.8)
        axes.plot(steps, running_mean(values, max(1, len(values) // 20)), color=color, label=name.replace("_", " "))
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width` - 1 values before it."""
    return [sum(window) / len(window) for i in range(len(values)) for window in [values[max(0, i + 1 - width) : i + 1]]]


def alignment_plane(scores: Sequence[PromptScore]) -> bytes:
    """SVG of the paper's figure (section 4): image over text alignment, one line per prompt from base to customized."""
    figure, axes = _figure(5.6, 3.4)
    ends = {
        "base model": [tuple(score.base[name] for name in PLANE) for score in scores],
        "customized": [tuple(score.adapter[name] for name in PLANE) for score in scores],
    }
    for start, end in zip(*ends.values(), strict=True):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-", "color": FAINT, "alpha": 0.35, "linewidth": 0.8})
    for (label, points), color in zip(ends.items(), (BASE, CUSTOMIZED), strict=True):
        axes.scatter(*zip(*points, strict=True), s=22, color=color, label=label, zorder=3)
    axes.set_xlabel("text alignment")
    axes.set_ylabel("image alignment")
    axes.legend(frameon=False)
    return _svg(figure)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.grid(color="#eceef3")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "customdiff"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    save_sheet(image, buffer)
    return buffer.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
