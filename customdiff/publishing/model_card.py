"""What is published of an adapter: its adapter.json without paths of this machine, and its model card, README.md.

The card's metadata follow the Hub's specification (huggingface/hub-docs, modelcard.md); huggingface_hub writes them.
"""

import csv
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig, LearnedConcept
from customdiff.config import Evaluate
from customdiff.errors import UserError
from customdiff.evaluation.prompts import JOIN as AND
from customdiff.evaluation.prompts import Prompt
from customdiff.images import open_rgb

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
MAX_SAMPLES = 12
FIGURES = {"image_alignment": "image alignment", "text_alignment": "text alignment"}
TAGS = {"custom_diffusion": "custom-diffusion", "textual_inversion": "textual_inversion", "lora": "lora"}


@dataclass(frozen=True)
class Sample:
    """An image that the adapter drew, and for which prompt."""

    prompt: str
    image: Image.Image


@dataclass(frozen=True)
class Evaluation:
    """What the stage `evaluate` found out about an adapter.

    Attributes:
        metrics: the figures of metrics.json, and nothing else of it.
        samples: the first image of each prompt, of at most `MAX_SAMPLES` prompts evenly chosen, by its file's name.
        sheet: the contact sheet, which shows the instance images too.
        settings: how the images were drawn, where that is known.
    """

    metrics: dict[str, Any]
    samples: dict[str, Sample]
    sheet: Image.Image | None
    settings: Evaluate | None = None


def read_evaluation(folder: Path | str, adapter_config: AdapterConfig, settings: Evaluate | None = None) -> Evaluation:
    """Read what the stage `evaluate` wrote into `folder`; its images and contact sheet may be missing.

    Args:
        adapter_config: of the adapter that was evaluated.

    Raises:
        UserError: there are no figures, they are damaged, or they are of other concepts than the adapter's.
    """
    folder = Path(folder)
    try:
        metrics = _numbers(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        table = folder / "per_prompt.csv"
        rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines())) if table.is_file() else []
        groups = {*metrics.get("concepts", {}), *(row["concept"] for row in rows)}
        _figures(metrics)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no figures can be read ({type(error).__name__}); `dvc repro` makes them") from error
    strangers = sorted({name for group in groups for name in group.split(AND)} - set(adapter_config.concepts))
    if strangers:
        raise UserError(f"{folder}: evaluates {', '.join(strangers)}, which this adapter has not learned")
    sheet = folder / "contact_sheet.jpg"
    return Evaluation(
        metrics=metrics,
        samples=_samples(folder / "images" / "customized", rows, adapter_config.concepts),
        sheet=open_rgb(sheet) if sheet.is_file() else None,
        settings=settings,
    )


def is_folder(model: str, near: Path) -> bool:
    """Whether a base model's name is that of a folder on this machine, rather than of a repository on the Hub.

    `data/base` has the form of either, so a folder of that name is looked for here and above `near`, the adapter's.
    """
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        return True
    return any((parent / model).exists() for parent in (Path.cwd(), *near.resolve().parents))


def published(adapter_config: AdapterConfig, near: Path, base_model: str | None = None) -> AdapterConfig:
    """An adapter's config as it is published: without paths of this machine.

    A base model in a folder becomes `./data/base` where its path leads into the project, else `./` and the folder's
    own name. No program takes a name with a leading dot for a repository on the Hub.

    Args:
        near: the adapter's folder.
        base_model: owner/name[@revision] of the same model on the Hub, instead of the one in the config.
    """
    base = adapter_config.base.model_dump(include={"model", "revision", "variant"})
    if base_model is not None:
        name, _, revision = base_model.partition("@")
        base = {"model": name, "revision": revision or None, "variant": None}
    elif is_folder(base["model"], near):
        base |= {"model": f"./{_inside(base['model'])}", "revision": None}
    values = adapter_config.model_dump(exclude={"base"}, exclude_unset=True)
    return AdapterConfig.model_validate(_without_paths(values) | {"base": base})


def make(
    repo: str,
    adapter_config: AdapterConfig,
    *,
    license: str,
    revision: str | None = None,
    evaluation: Evaluation | None = None,
    with_sheet: bool = False,
) -> ModelCard:
    """The model card.

    Args:
        repo: owner/name.
        adapter_config: as `published`.
        license: an identifier of the Hub's list.
        revision: the branch that it is for; None: the main one.
        evaluation: figures, and images that lie in `images/` beside the card.
        with_sheet: `contact_sheet.jpg` lies there too.

    Raises:
        UserError: jinja2 is not installed.
    """
    name = repo.partition("/")[2]
    concepts = [_described(concept) for concept in adapter_config.concepts.values()]
    samples = evaluation.samples if evaluation else {}
    results = _eval_results(evaluation.metrics) if evaluation else []
    on_hub = not adapter_config.base.model.startswith("./")
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=adapter_config.base.model if on_hub else None,  # the Hub takes it for a repository, whatever it is
        base_model_relation="adapter" if on_hub else None,
        tags=[TAGS[adapter_config.method], "text-to-image", "diffusers", *_family_tags(adapter_config)],
        instance_prompt=", ".join(concept["prompt"] for concept in concepts),
        inference=False,  # the Hub's own servers draw with whole models and LoRA alone
        widget=[{"text": each.prompt, "output": {"url": f"images/{file}"}} for file, each in samples.items()] or None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    try:
        return ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            name=name,
            repo=repo,
            revision=revision,
            adapter=adapter_config,
            on_hub=on_hub,
            concepts=concepts,
            prompt=next((each.prompt for each in samples.values()), concepts[0]["prompt"]),
            samples=samples,
            settings=evaluation.settings if evaluation else None,
            figures=_figures(evaluation.metrics) if evaluation else [],
            num_prompts=evaluation.metrics.get("num_prompts") if evaluation else None,
            with_sheet=with_sheet,
            weights=f"{adapter.weights_name(adapter_config)}.safetensors",
            code=_code,
            quoted=lambda text: json.dumps(text, ensure_ascii=False),
            shell=shlex.quote,
        )
    except ImportError as error:
        raise UserError("a model card needs jinja2; install customdiff[pipeline]") from error


def _described(concept: LearnedConcept) -> dict[str, str]:
    """A concept as the template needs it."""
    token, class_prompt = concept.modifier_token, concept.class_prompt
    template = concept.instance_prompt if concept.instance_prompt != "{}" else f"photo of a {{}} {class_prompt}".strip()
    file = f"{adapter.token_file(token)}.safetensors"
    return {"token": token, "class": class_prompt, "prompt": template.replace("{}", token), "file": file}


def _samples(
    folder: Path, rows: Sequence[Mapping[str, str]], concepts: Mapping[str, LearnedConcept]
) -> dict[str, Sample]:
    """Samples by file name; row n of the table of prompts has its images in `<concept>/<n>-...-<number>.png`."""
    found = {}
    for place, row in enumerate(rows, 1):
        subjects = [concepts[name].subject for name in row["concept"].split(AND)]
        prompt = Prompt(row["prompt"]).of(*subjects)
        for path in sorted(folder.glob(f"*/{place:02d}-*-0.png"))[:1]:
            found[path.name] = (prompt, path)
    step = max(1, -(-len(found) // MAX_SAMPLES))
    return {name: Sample(prompt, open_rgb(path)) for name, (prompt, path) in list(found.items())[::step]}


def _figures(metrics: Mapping) -> list[dict[str, Any]]:
    """Rows of the card's table: whose figure it is, its name, base, customized, the change and its interval."""
    groups = metrics.get("concepts") or {"": metrics}
    return [
        {
            "concept": concept if len(groups) > 1 else "",
            "name": label,
            "base": figures[f"base_{key}"],
            "customized": figures[key],
            "change": figures[f"{key}_delta"],
            "interval": figures.get(f"{key}_delta_ci95"),
        }
        for concept, figures in groups.items()
        for key, label in FIGURES.items()
        if {key, f"base_{key}", f"{key}_delta"} <= set(figures)
    ]


def _eval_results(metrics: Mapping) -> list[EvalResult]:
    """The figures over all concepts, for the card's model-index."""
    return [
        EvalResult(
            task_type="text-to-image",
            dataset_type="evaluation-prompts",
            dataset_name=f"{metrics.get('num_prompts', '')} evaluation prompts".strip(),
            metric_type=key.replace("_", "-"),
            metric_name=label,
            metric_value=metrics[key],
        )
        for key, label in FIGURES.items()
        if key in metrics
    ]


def _family_tags(adapter_config: AdapterConfig) -> list[str]:
    """The Hub's tags for the base model's family, where the card knows it."""
    family = adapter_config.family
    if family is None:
        return []
    return ["stable-diffusion-xl" if family == "Stable Diffusion XL" else "stable-diffusion"]


def _numbers(value: Any) -> Any:
    """JSON with its numbers, and lists and objects of such, alone: no text, so no path."""
    if isinstance(value, dict):
        kept = {key: _numbers(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if each is not None}
    if isinstance(value, list):
        return [each for each in map(_numbers, value) if each is not None]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _without_paths(value: Any) -> Any:
    """JSON in which a text that is an absolute path is cut to its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return _inside(value) if isinstance(value, str) and _leads_out(value) else value


def _leads_out(text: str) -> bool:
    """Whether a text is a path that begins at a root, a home or a parent folder."""
    path = PureWindowsPath(text) if PureWindowsPath(text).is_absolute() else PurePosixPath(text)
    return len(path.parts) > 1 and (path.is_absolute() or path.parts[0] == "~" or ".." in path.parts)


def _inside(text: str) -> str:
    """A path within the project as it is, with slashes; of any other the last part."""
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name if _leads_out(text) else path.as_posix()


def _code(text: object) -> str:
    """Markdown for a text in the font of code, whatever it holds; fit for a table."""
    plain = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{ticks}{plain}{ticks}" if len(ticks) == 1 else f"{ticks} {plain} {ticks}"
