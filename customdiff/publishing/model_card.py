"""Model card of a published adapter (README.md), and its adapter.json without paths of this machine.

The card's metadata follow the Hub's specification (huggingface/hub-docs, modelcard.md).
"""

import csv
import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from pydantic import BaseModel, ConfigDict

from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig, LearnedConcept
from customdiff.config import Evaluate
from customdiff.errors import UserError
from customdiff.evaluation.metrics import PairedMetric
from customdiff.evaluation.prompts import JOIN, Prompt
from customdiff.images import open_rgb

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
MAX_SAMPLES = 12
ALIGNMENTS = {
    "image_alignment": "image alignment",
    "masked_image_alignment": "image alignment of cut-out subjects",
    "identity": "identity",
    "text_alignment": "text alignment",
}
TAGS = {"custom_diffusion": "custom-diffusion", "textual_inversion": "textual_inversion", "lora": "lora"}


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Alignments(_Read):
    """Metrics of a group of prompts; those that the evaluation did not have are None."""

    text_alignment: PairedMetric
    image_alignment: PairedMetric
    masked_image_alignment: PairedMetric | None = None
    identity: PairedMetric | None = None


class Metrics(Alignments):
    """The contents of metrics.json that are published: figures, and nothing else that may be in the file.

    Attributes:
        concepts: figures by concept; names of concepts that are shown together are joined by `JOIN`.
    """

    concepts: dict[str, Alignments]
    num_prompts: int
    num_images: int


@dataclass(frozen=True)
class Sample:
    """An image that the adapter generated, and its prompt."""

    prompt: str
    image: Image.Image


@dataclass(frozen=True)
class Evaluation:
    """What is published of an evaluation.

    Attributes:
        metrics: the figures of metrics.json.
        samples: by file name, the first image of each prompt, for at most `MAX_SAMPLES` evenly chosen prompts.
        sheet: the contact sheet, which shows the instance images too; None: not published.
        settings: how the images were generated; None: unknown.
    """

    metrics: Metrics
    samples: dict[str, Sample]
    sheet: Image.Image | None = None
    settings: Evaluate | None = None


def read_evaluation(
    folder: Path | str, config: AdapterConfig, settings: Evaluate | None = None, *, with_sheet: bool = False
) -> Evaluation:
    """Read what the stage `evaluate` wrote to `folder`; its images may be missing.

    Args:
        config: of the adapter that was evaluated.
        settings: how the images were generated, if known.
        with_sheet: also read the contact sheet, which shows the instance images.

    Raises:
        UserError: there are no figures or no contact sheet, the figures are damaged or of other concepts.
    """
    folder = Path(folder)
    table = folder / "per_prompt.csv"
    try:
        metrics = Metrics.model_validate_json((folder / "metrics.json").read_bytes())
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines())) if table.is_file() else []
        groups = {*metrics.concepts, *(row["concept"] for row in rows)}
    except (OSError, ValueError, KeyError) as error:  # pydantic's errors are ValueErrors
        raise UserError(
            f"{folder}: metrics.json or per_prompt.csv cannot be read ({type(error).__name__}); run `dvc repro`"
        ) from error
    unknown = sorted({name for group in groups for name in group.split(JOIN)} - set(config.concepts))
    if unknown:
        raise UserError(f"{folder}: evaluates {', '.join(unknown)}, which this adapter has not learned")
    sheet = folder / "contact_sheet.jpg"
    if with_sheet and not sheet.is_file():
        raise UserError(f"{sheet}: no contact sheet; run `dvc repro`")
    return Evaluation(
        metrics=metrics,
        samples=_samples(folder / "images" / "customized", rows, config.concepts),
        sheet=open_rgb(sheet) if with_sheet else None,
        settings=settings,
    )


def is_folder(model: str, near: Path) -> bool:
    """Whether a base model's name is a folder on this machine rather than a repository on the Hub.

    `data/base` can be either, so such a folder is looked for in the current folder and above `near`.

    Args:
        near: the adapter's folder.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return True
    return any((parent / model).exists() for parent in (Path.cwd(), *near.resolve().parents))


def published(config: AdapterConfig, near: Path, base_model: str | None = None) -> AdapterConfig:
    """An adapter's config as it is published: without paths of this machine.

    A base model in a folder becomes `./data/base` if its path is inside the project, else `./` and the folder's name.
    A name with a leading dot is never a repository on the Hub.

    Args:
        near: the adapter's folder.
        base_model: owner/name[@revision] of the same base model on the Hub, instead of the one in `config`.
    """
    base = config.base.model_dump(include={"model", "revision", "variant"})
    if base_model is not None:
        name, _, revision = base_model.partition("@")
        base = {"model": name, "revision": revision or None, "variant": None}
    elif is_folder(base["model"], near):
        base |= {"model": f"./{_inside(base['model'])}", "revision": None}
    values = config.model_dump(exclude={"base"}, exclude_unset=True)
    return AdapterConfig.model_validate(_without_paths(values) | {"base": base})


def make(
    repo: str,
    config: AdapterConfig,
    *,
    license: str,
    revision: str | None = None,
    evaluation: Evaluation | None = None,
) -> ModelCard:
    """The model card.

    Args:
        repo: owner/name.
        config: as `published` returns it.
        license: an identifier from the Hub's list.
        revision: the branch that the card is for; None: the default branch.
        evaluation: figures to show; its images are linked in `images/` and as `contact_sheet.jpg`.

    Raises:
        UserError: jinja2 is not installed.
    """
    concepts = [_described(concept) for concept in config.concepts.values()]
    samples = evaluation.samples if evaluation else {}
    try:
        return ModelCard.from_template(
            _metadata(repo, config, concepts, license, evaluation),
            template_path=str(TEMPLATE),
            name=repo.partition("/")[2],
            repo=repo,
            revision=revision,
            adapter=config,
            on_hub=_on_hub(config),
            concepts=concepts,
            prompt=next((each.prompt for each in samples.values()), concepts[0]["prompt"]),
            evaluation=evaluation,
            rows=list(_rows(evaluation.metrics)) if evaluation else [],
            weights=f"{adapter.weights_name(config)}.safetensors",
            code=_code,
            plain=_plain,
            quoted=lambda text: json.dumps(text, ensure_ascii=False),
            shell=shlex.quote,
        )
    except ImportError as error:
        raise UserError("a model card needs jinja2; install customdiff[pipeline]") from error


def _metadata(
    repo: str, config: AdapterConfig, concepts: list[dict[str, str]], license: str, evaluation: Evaluation | None
) -> ModelCardData:
    """The metadata at the top of the card."""
    samples = evaluation.samples if evaluation else {}
    results = _eval_results(evaluation.metrics) if evaluation else None
    family = {None: [], "Stable Diffusion XL": ["stable-diffusion-xl"]}.get(config.family, ["stable-diffusion"])
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=config.base.model if _on_hub(config) else None,  # the Hub would link any name to a repository
        base_model_relation="adapter" if _on_hub(config) else None,
        tags=[TAGS[config.method], "text-to-image", "diffusers", *family],
        instance_prompt=", ".join(concept["prompt"] for concept in concepts),
        inference=False,  # the Hub's servers can only run whole models and LoRA
        widget=[{"text": each.prompt, "output": {"url": f"images/{file}"}} for file, each in samples.items()] or None,
        eval_results=results,
        model_name=repo.partition("/")[2] if results else None,
    )


def _on_hub(config: AdapterConfig) -> bool:
    """Whether the base model of a published config is a repository on the Hub."""
    return not config.base.model.startswith("./")


def _described(concept: LearnedConcept) -> dict[str, str]:
    """The values of a concept that the template needs."""
    token, class_prompt = concept.modifier_token, " ".join(concept.class_prompt.split())
    template = concept.instance_prompt if concept.instance_prompt != "{}" else f"photo of a {{}} {class_prompt}".strip()
    file = f"{adapter.token_file(token)}.safetensors"
    prompt = " ".join(template.replace("{}", token).split())
    return {"token": token, "class": class_prompt, "prompt": prompt, "file": file}


def _samples(
    folder: Path, rows: Sequence[Mapping[str, str]], concepts: Mapping[str, LearnedConcept]
) -> dict[str, Sample]:
    """Samples by file name; the images of row n of per_prompt.csv are `<concept>/<n>-...-<number>.png`."""
    found = {}
    for place, row in enumerate(rows, 1):
        names = tuple(row["concept"].split(JOIN))
        prompt = Prompt(row["prompt"], names).fill(*(concepts[name].subject for name in names))
        for path in sorted(folder.glob(f"*/{place:02d}-*-0.png"))[:1]:
            found[path.name] = (prompt, path)
    step = max(1, -(-len(found) // MAX_SAMPLES))
    return {name: Sample(prompt, open_rgb(path)) for name, (prompt, path) in list(found.items())[::step]}


def _rows(metrics: Metrics) -> Iterator[tuple[str, PairedMetric]]:
    """Labels and figures of the card's table: by concept if there are several."""
    groups: Mapping[str, Alignments] = metrics.concepts if len(metrics.concepts) > 1 else {"": metrics}
    for concept, alignments in groups.items():
        for key, name in ALIGNMENTS.items():
            if found := getattr(alignments, key):
                yield f"{concept}: {name}" if concept else name, found


def _eval_results(metrics: Metrics) -> list[EvalResult]:
    """The figures over all prompts, for the model-index of the metadata."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="evaluation-prompts",
            dataset_name=f"{metrics.num_prompts} evaluation prompts",
            metric_type=key.replace("_", "-"),
            metric_name=name,
            metric_value=found.adapter,
        )
        for key, name in ALIGNMENTS.items()
        if (found := getattr(metrics, key))
    ]


def _without_paths(value: Any) -> Any:
    """JSON values in which a string that is a path to outside the project is reduced to its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return _inside(value) if isinstance(value, str) and _leads_out(value) else value


def _leads_out(text: str) -> bool:
    """Whether a text is a path that starts at a root or a home folder, or contains `..`."""
    path = PureWindowsPath(text) if PureWindowsPath(text).is_absolute() else PurePosixPath(text)
    return len(path.parts) > 1 and (path.is_absolute() or path.parts[0] == "~" or ".." in path.parts)


def _inside(text: str) -> str:
    """A path inside the project with slashes, or the last part of any other path."""
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name if _leads_out(text) else path.as_posix()


def _code(text: object) -> str:
    """Markdown that shows any text as code, also inside a table."""
    plain = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{ticks}{plain}{ticks}" if len(ticks) == 1 else f"{ticks} {plain} {ticks}"


def _plain(text: object) -> str:
    """Markdown that shows any text as it is, without HTML, links or images, also inside a table."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
