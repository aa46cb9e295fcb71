"""Draw the same prompts from the same seeds with the base model and with the adapter, and grade both."""

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from customdiff.adapters.config import AdapterConfig
from customdiff.config import Concept, Params
from customdiff.errors import UserError
from customdiff.evaluation.base_image_cache import base_images
from customdiff.evaluation.metrics import bootstrap_interval, image_alignment, text_alignment, without_token
from customdiff.images import SUFFIXES, open_rgb, save_all
from customdiff.models.clip import Clip
from customdiff.models.sampling import generate, image_seed

KINDS = ("scene", "companion", "style", "property")
FIGURES = ("text_alignment", "image_alignment")
COLUMNS = (
    "concept",
    "prompt",
    "kind",
    *(f"{p}{f}{s}" for f in FIGURES for p, s in (("base_", ""), ("", ""), ("", "_delta"))),
)


# Between the names of concepts that a prompt shows in one picture; no name of a concept holds a space.
AND = " and "
TOGETHER = "together.txt"


@dataclass(frozen=True)
class Prompt:
    """A prompt with {} in the subject's place, and what it asks for: scene, companion, style, property, or other.

    A prompt about several concepts has {1}, {2} and so on, in the order of params.yaml.
    """

    template: str
    kind: str = "other"

    def of(self, *subjects: str) -> str:
        """The prompt about one subject, or about several."""
        text = self.template.replace("{}", subjects[0])
        for number, subject in enumerate(subjects, 1):
            text = text.replace(f"{{{number}}}", subject)
        return text


class Shot(NamedTuple):
    """One image that every model draws."""

    concept: str  # its name; several names joined by `AND`
    prompt: Prompt
    number: int  # among the images of this prompt, from 0
    seed: int


@dataclass(frozen=True)
class Pair:
    """One prompt and seed, drawn twice."""

    concept: str  # its name; several names joined by `AND`
    prompt: Prompt
    text: str  # the prompt without its modifier token, which both images are graded against
    number: int  # among the images of this prompt, from 0
    base: Image.Image
    customized: Image.Image


def all_prompts(params: Params) -> dict[str, list[Prompt]]:
    """What `evaluate` draws: the prompts of each concept, and those of all of them in one picture where there are any.

    Raises:
        UserError: a prompt file is missing, empty, or has a line without its placeholders.
    """
    folder, concepts = params.evaluate.prompts, params.concepts
    prompts = {name: read_prompts(folder, concept.class_prompt) for name, concept in concepts.items()}
    together = read_together(folder, len(concepts))
    return prompts | ({AND.join(concepts): together} if together else {})


def read_prompts(folder: Path | str, class_prompt: str) -> list[Prompt]:
    """Prompts for a class: those of `<class_prompt>.txt`, spaces as _, where there is one, else of `default.txt`.

    One prompt a line, as `kind: prompt` or the prompt alone, with {} for the subject; # begins a comment.

    Raises:
        UserError: there is no file, it is empty, or a line lacks {}.
    """
    own, default = Path(folder, f"{class_prompt.replace(' ', '_')}.txt"), Path(folder, "default.txt")
    path = own if own.is_file() else default
    try:
        prompts = _read_lines(path, ["{}"])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluate.prompts: neither {own.name} nor default.txt can be read in {folder}") from error
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line, such as `scene: a {{}} on the grass`")
    return prompts


def read_together(folder: Path | str, count: int) -> list[Prompt]:
    """Prompts that show `count` concepts in one picture, {1} to {count}: those of `together.txt`, where there is one.

    Raises:
        UserError: a line lacks {1} or {2}.
    """
    path = Path(folder, TOGETHER)
    if count < 2 or not path.is_file():
        return []
    numbers = [f"{{{number}}}" for number in range(1, count + 2)]
    return [
        prompt
        for prompt in _read_lines(path, numbers[:2])
        if all(number in prompt.template for number in numbers[:-1]) and numbers[-1] not in prompt.template
    ]


def _read_lines(path: Path, placeholders: Sequence[str]) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        kind, colon, rest = text.partition(":")
        prompt = Prompt(rest.strip(), kind) if colon and kind in KINDS else Prompt(text)
        for placeholder in placeholders if text else ():
            if placeholder not in prompt.template:
                raise UserError(
                    f"{path}: line {number}: lacks {placeholder}, which stands for the subject (here: {text!r})"
                )
        if text and prompt not in prompts:
            prompts.append(prompt)
    return prompts


def read_instances(folder: Path) -> list[Image.Image]:
    """The instance images that download-data stored, in the order of their names.

    Raises:
        UserError: there are none.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: holds no images; `dvc repro` fetches them")
    return [open_rgb(path) for path in paths]


def check_concepts(adapter_config: AdapterConfig, params: Params) -> None:
    """Refuse an adapter that has not learned the concepts of params.yaml under their tokens.

    The tokenizer would take an unknown token apart in silence, and the figures would be of another prompt.

    Raises:
        UserError: a concept is missing, or has another token.
    """
    learned = {name: concept.modifier_token for name, concept in adapter_config.concepts.items()}
    for name, concept in params.concepts.items():
        if learned.get(name) != concept.modifier_token:
            raise UserError(
                f"concepts.{name}: the adapter has not learned it as {concept.modifier_token}; `dvc repro` trains it"
            )


def draw(
    pipe: DiffusionPipeline,
    customize: Callable[[DiffusionPipeline], object],
    params: Params,
    prompts: Mapping[str, Sequence[Prompt]],
    base_drawn: Path | None = None,
) -> list[Pair]:
    """Draw every prompt of every concept, first with the base model, then, from the same seeds, with the adapter.

    In the base model's prompts {} is the class ("cat"), in the adapter's the token and the class ("<new1> cat").

    Args:
        pipe: the base model with the scheduler to use.
        customize: puts the adapter into `pipe`.
        params: the sections `evaluate`, `concepts` and `base.seed`.
        prompts: by concept, or by several joined by `AND`; see `all_prompts`.
        base_drawn: folder with what the base model drew in the last evaluations; see `drawn.base_images`.
    """
    wanted = shots(params, prompts)
    base = take_of_base(pipe, wanted, params, base_drawn)
    customize(pipe)
    return pairs(wanted, base, take(pipe, wanted, params, customized_subject, "customized"), params)


def shots(params: Params, prompts: Mapping[str, Sequence[Prompt]]) -> list[Shot]:
    """All images that an evaluation draws with each model, in order."""
    return [
        Shot(name, prompt, number, image_seed(params.base.seed, name, prompt.template, number))
        for name in prompts
        for prompt in prompts[name]
        for number in range(params.evaluate.num_images)
    ]


def take(
    pipe: DiffusionPipeline,
    wanted: Sequence[Shot],
    params: Params,
    subject: Callable[[Concept], str],
    progress: str | None = None,
) -> list[Image.Image]:
    """Draw each shot with the pipeline as it is; `subject` says what {} stands for."""
    settings = params.evaluate
    return generate(
        pipe,
        texts_of(wanted, params, subject),
        [shot.seed for shot in wanted],
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        batch_size=settings.batch_size,
        progress=progress,
    )


def take_of_base(
    pipe: DiffusionPipeline, wanted: Sequence[Shot], params: Params, base_drawn: Path | None
) -> list[Image.Image]:
    """Each shot as the base model draws it, asked for the class; drawn once while nothing that shapes it changes.

    Args:
        pipe: the base model, nothing put into it yet.
        base_drawn: see `drawn.base_images`.
    """
    return base_images(
        base_drawn,
        pipe,
        params,
        texts_of(wanted, params, class_subject),
        [shot.seed for shot in wanted],
        lambda: take(pipe, wanted, params, class_subject, "base model"),
    )


def texts_of(wanted: Sequence[Shot], params: Params, subject: Callable[[Concept], str]) -> list[str]:
    """What a model is asked for in each shot; `subject` says what {} stands for."""
    return [shot.prompt.of(*map(subject, concepts_of(shot.concept, params))) for shot in wanted]


def pairs(
    wanted: Sequence[Shot], base: Sequence[Image.Image], customized: Sequence[Image.Image], params: Params
) -> list[Pair]:
    """Each shot as the base model drew it, beside the same with an adapter."""
    return [
        Pair(shot.concept, shot.prompt, graded_text(shot.prompt, concepts_of(shot.concept, params)), shot.number, *both)
        for shot, *both in zip(wanted, base, customized, strict=True)
    ]


def concepts_of(name: str, params: Params) -> list[Concept]:
    """The concept of that name, or all of those whose names `AND` joins."""
    return [params.concepts[each] for each in name.split(AND)]


def graded_text(prompt: Prompt, concepts: Sequence[Concept]) -> str:
    """What both images of a prompt are graded against: the prompt without its modifier tokens."""
    tokens = [concept.modifier_token for concept in concepts]
    return without_token(prompt.of(*map(customized_subject, concepts)), *tokens)


def class_subject(concept: Concept) -> str:
    """How a prompt speaks to the base model: "cat"."""
    return concept.class_prompt


def customized_subject(concept: Concept) -> str:
    """How a prompt speaks of the concept: "<new1> cat"."""
    return f"{concept.modifier_token} {concept.class_prompt}"


def score(pairs: Sequence[Pair], instances: Mapping[str, Sequence[Image.Image]], judge: Clip) -> list[dict]:
    """The table of prompts: for each, the mean figures over its images, of the base model and customized.

    Args:
        pairs: what `draw` drew.
        instances: instance images by concept.
        judge: embeds texts and images.

    Returns:
        A row a prompt with the keys of `COLUMNS`. The image alignment of several concepts in one picture is the mean
        of those to each (section 4.2 of the paper).
    """
    texts = judge.text([pair.text for pair in pairs])
    references = {name: judge.images(images) for name, images in instances.items()}
    figures = {}
    for prefix, images in (("base_", [p.base for p in pairs]), ("", [p.customized for p in pairs])):
        embedded = judge.images(images)
        figures[f"{prefix}text_alignment"] = text_alignment(embedded, texts)
        figures[f"{prefix}image_alignment"] = np.array(
            [
                np.mean([image_alignment(row[None], references[name])[0] for name in pair.concept.split(AND)])
                for row, pair in zip(embedded, pairs, strict=True)
            ]
        )
    places: dict[tuple[str, Prompt], list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault((pair.concept, pair.prompt), []).append(place)
    rows = []
    for (concept, prompt), chosen in places.items():
        row = {"concept": concept, "prompt": prompt.template, "kind": prompt.kind}
        row |= {name: float(values[chosen].mean()) for name, values in figures.items()}
        rows.append(row | {f"{name}_delta": row[name] - row[f"base_{name}"] for name in FIGURES})
    return rows


def summarize(rows: Sequence[Mapping], *, resamples: int, seed: int) -> dict:
    """Figures over all concepts, and below `concepts` those of each.

    Over all: the mean over concepts, and for the paired deltas, customized less base, the 95 % bootstrap interval over
    prompts. Prompts that show several concepts in one picture have figures of their own below `concepts`, and are no
    part of what is over all.
    """
    concepts = dict.fromkeys(row["concept"] for row in rows)
    by_concept = {name: [row for row in rows if row["concept"] == name] for name in concepts}

    def figures(groups: Sequence[Sequence[Mapping]]) -> dict:
        def mean(name: str) -> float:
            return float(np.mean([np.mean([row[name] for row in group]) for group in groups]))

        def interval(name: str) -> list[float]:
            deltas = [np.array([row[name] for row in group]) for group in groups]
            return [round(end, 6) for end in bootstrap_interval(deltas, resamples=resamples, seed=seed)]

        names = [*FIGURES, *(f"base_{name}" for name in FIGURES), *(f"{name}_delta" for name in FIGURES)]
        return {name: round(mean(name), 6) for name in names} | {
            f"{name}_delta_ci95": interval(f"{name}_delta") for name in FIGURES
        }

    each = {name: figures([group]) for name, group in by_concept.items()}
    alone = [group for name, group in by_concept.items() if AND not in name]
    return figures(alone) | {"concepts": each}


def write_table(rows: Iterable[Mapping], path: Path) -> None:
    """Write the table of prompts as CSV, figures with six digits, for `dvc plots` and spreadsheets."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows:
            table.writerow({key: f"{row[key]:.6f}" if isinstance(row[key], float) else row[key] for key in COLUMNS})


def write_images(pairs: Sequence[Pair], folder: Path) -> None:
    """Write `<folder>/base/<concept>/...png` and `<folder>/customized/<concept>/...png`, under the same names."""
    places: dict[tuple[str, Prompt], int] = {}
    drawn = {}
    for pair in pairs:
        place = places.setdefault((pair.concept, pair.prompt), len(places) + 1)
        words = re.sub(r"[^a-z0-9]+", "-", pair.prompt.template.lower()).strip("-")[:60]
        for kind in ("base", "customized"):
            path = folder / kind / pair.concept.replace(" ", "-") / f"{place:02d}-{words}-{pair.number}.png"
            drawn[path] = getattr(pair, kind)
    save_all(drawn)
