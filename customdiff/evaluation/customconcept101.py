"""The benchmark CustomConcept101 (Kumari et al. 2023): its data set, its protocol, and the table of its authors.

The data set has 101 concepts and 101 pairs of them, each with prompts. An adapter of every concept, and one of every
pair, which is trained jointly, generates its prompts; the table has the means over concepts and over pairs.
"""

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from customdiff.adapters import adapter
from customdiff.adapters.config import read_config
from customdiff.config import Concept, Evaluate, Params
from customdiff.errors import UserError
from customdiff.evaluation.generation import Generation, customized_subject, generate_images
from customdiff.evaluation.judges import Judges
from customdiff.evaluation.metrics import image_alignment, text_alignment
from customdiff.evaluation.prompts import JOIN, Prompt
from customdiff.files import atomic_directory, atomic_file, sha256
from customdiff.images import save_all
from customdiff.preparation.prepare import prepare_concept
from customdiff.retrieval.class_images import retrieve
from customdiff.sources.image_folder import is_image, walk
from customdiff.sources.instance_images import collect, read_instance_images
from customdiff.tracking import Tracker
from customdiff.training import trainer

SINGLE, JOINT = "single", "joint"
METRICS = ("text_alignment", "image_alignment", "dino")
# the authors' table (customconcept101/README.md of adobe-research/custom-diffusion) by kind and sampler steps
PAPER = {
    (SINGLE, 200): (0.7602, 0.7440, 0.5311),
    (SINGLE, 50): (0.7583, 0.7456, 0.5335),
    (JOINT, 200): (0.7567, 0.6680, 0.3760),
    (JOINT, 50): (0.7534, 0.6704, 0.3799),
}
# The authors sample by DDIM with eta 1, which is DDPM on a part of the time steps, and guidance scale 6 (sample.py).
PROTOCOL = {"scheduler": "ddim", "eta": 1.0, "guidance_scale": 6.0, "seeds": 1}
DINO_SIDES = (256, 224)  # px: shorter side that an image is scaled to, and the square cut out of its centre
Scores = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """One adapter of the benchmark: of a concept, or of a pair of concepts that are trained jointly.

    Attributes:
        concepts: by name, the name of the folder of its photos.
        class_images: folders by name; None where the data set has none.
        prompts: that the adapter generates.
    """

    concepts: dict[str, Concept]
    class_images: dict[str, Path | None]
    prompts: list[Prompt]

    @property
    def key(self) -> str:
        """Its name: `pet_cat1`, or `pet_cat1+pet_dog2`."""
        return JOIN.join(self.concepts)

    @property
    def kind(self) -> str:
        """`single` or `joint`."""
        return SINGLE if len(self.concepts) == 1 else JOINT


def read(data: Path) -> list[Entry]:
    """The entries of `dataset.json`, then those of `dataset_multiconcept.json`, if it exists.

    Args:
        data: folder of the data set, with both files, `prompts/`, and the photos (benchmark_dataset.zip, unpacked).

    Raises:
        UserError: a file is missing or not as the data set's, or a folder has no photos.
    """
    single, joint = "dataset.json", "dataset_multiconcept.json"
    entries = [_entry(data, single, [item], "prompt_filename", item) for item in _json(data, single)]
    if (data / joint).is_file():
        for items in _json(data, joint):
            *concepts, prompts = items if isinstance(items, list) and items else [None]
            entries.append(_entry(data, joint, concepts, "prompt_filename_compose", prompts))
    return entries


def _json(data: Path, file: str) -> list[Any]:
    try:
        found = json.loads((data / file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{data / file}: cannot be read ({error}); give the folder customconcept101 of the repository "
            "adobe-research/custom-diffusion"
        ) from error
    if not isinstance(found, list) or not found:
        raise UserError(f"{data / file}: must be a list of concepts, or of lists of concepts")
    return found


def _entry(data: Path, file: str, items: Sequence[Any], key: str, prompts: Any) -> Entry:
    """An entry of the concepts `items`; `prompts`: what names its file of prompts under `key`."""
    concepts: dict[str, Concept] = {}
    classes: dict[str, Path | None] = {}
    if not items or not isinstance(prompts, dict) or not isinstance(prompts.get(key), str):
        raise UserError(f"{data / file}: an entry lacks {key} (here: {json.dumps(prompts)[:200]})")
    for item in items:
        try:
            folder, prompt = data / item["instance_data_dir"], item["instance_prompt"]
            token = re.findall(r"<[^\s<>]+>", prompt)[0]
            name = re.sub(r"[^a-z0-9_-]", "-", folder.name.lower())
            values = {"source": {"path": str(folder)}, "modifier_token": token, "class_prompt": item["class_prompt"]}
            concepts[name] = Concept.model_validate(values | {"instance_prompt": prompt.replace(token, "{}", 1)})
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{data / file}: an entry needs instance_data_dir, class_prompt, and an instance_prompt with a token "
                f"such as <new1> (here: {json.dumps(item)[:200]})"
            ) from error
        if not folder.is_dir() or not any(is_image(each) for each in walk(folder)):
            raise UserError(f"{folder}: has no photos ({file}); unpack benchmark_dataset.zip in {data}")
        regularization = data / item["class_data_dir"] if item.get("class_data_dir") else None
        classes[name] = regularization if regularization and regularization.is_dir() else None
    if len({concept.modifier_token for concept in concepts.values()}) < len(items):
        raise UserError(f"{data / file}: {JOIN.join(concepts)}: each concept of a pair needs a token of its own")
    return Entry(concepts, classes, _prompts(data / prompts[key], tuple(concepts)))


def _prompts(path: Path, names: tuple[str, ...]) -> list[Prompt]:
    """The prompts of a file, one per line; {0} and {1} of pairs become {1} and {2}."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the prompts of {JOIN.join(names)} cannot be read ({error})") from error
    if not lines:
        raise UserError(f"{path}: has no prompts")
    texts = [re.sub(r"\{(\d)\}", lambda found: f"{{{int(found[1]) + 1}}}", line) for line in lines]
    wanted = ["{}"] if len(names) == 1 else [f"{{{number}}}" for number in range(1, len(names) + 1)]
    for text, line in zip(texts, lines, strict=True):
        if not any(each in text for each in wanted):  # one line of the data set has {0} twice
            raise UserError(f"{path}: {line!r} lacks a placeholder: {{}} of a concept, {{0}} and {{1}} of a pair")
    return [Prompt(text, names) for text in dict.fromkeys(texts)]


def protocol(
    params: Params,
    *,
    steps: int = 200,
    num_images: int = 5,
    clip: str = "openai/clip-vit-base-patch32",
    dino: str = "facebook/dino-vits16",
) -> Params:
    """Parameters with the protocol of the benchmark in section `evaluate`; the models can be replaced for tests."""
    changes = {"steps": steps, "num_images": num_images, "clip": clip, "identity": dino, "masked": False}
    evaluate = Evaluate.model_validate(params.evaluate.model_dump() | PROTOCOL | changes)
    return params.model_copy(update={"evaluate": evaluate})


def params_of(params: Params, entry: Entry) -> Params:
    """The parameters of an entry: those of params.yaml with the concepts of the data set.

    An entry of two concepts trains for twice `train.max_steps`, as in the authors' scripts, and all to their last step.
    """
    values = params.model_dump()
    values["concepts"] = {name: concept.model_dump() for name, concept in entry.concepts.items()}
    values["download"]["minimum"] = 1
    values["train"]["max_steps"] *= len(entry.concepts)
    values["train"]["validation"]["prompts"] = []
    values["train"] |= {"select": "last", "patience": None}
    return Params.model_validate(values)


def learn(params: Params, entry: Entry, work: Path, class_images: Path, out: Path) -> None:
    """Train an entry and write its adapter to `out`; an interrupted training continues.

    Class images are those of the data set, or else the base model generates them.

    Args:
        work: folder with `instances`, and for intermediate files.
        class_images: folder of the class images of all entries, which concepts of one class share.

    Raises:
        UserError: photos, class images or models cannot be read.
    """
    for name, concept in entry.concepts.items():
        classes = work
        if params.train.preserves_prior:
            own = _retrieval(params, entry.class_images[name])
            values = own.model_dump(include={"base": {"model", "revision", "seed"}, "retrieve": True, "download": True})
            classes = class_images / _hash(values | {"class_prompt": concept.class_prompt})
            if not (classes / "manifest.json").exists():
                retrieve(own, name, instances=work / "instances" / name, index="", out=classes)
        instances, out_folder = work / "instances" / name, work / "prepared" / name
        others = {other: work / "instances" / other for other in entry.concepts if other != name}
        prepare_concept(params, name, instances=instances, classes=classes, out=out_folder, others=others)
    trainer.run(params, work / "prepared", work / "runs", lambda _: Tracker()).copy_results(out, work / "training")


def _retrieval(params: Params, class_images: Path | None) -> Params:
    """Parameters that take class images from a folder, or have the base model generate them."""
    changes = {"backend": "folder", "folder": str(class_images)} if class_images else {"backend": "generate"}
    return params.model_copy(update={"retrieve": params.retrieve.model_copy(update=changes)})


def score(
    params: Params, entry: Entry, adapter_folder: Path, instances: Mapping[str, Sequence[Image.Image]], judges: Judges
) -> tuple[Scores, list[Image.Image], list[str]]:
    """Generate the prompts of an entry and score the images.

    Returns:
        The means over all images of `METRICS`: CLIPScore with the prompt without tokens, 2.5 * max(cos, 0); the mean
        cosine of CLIP's image features to all photos, and of DINO's, for a pair the mean over its concepts. Then the
        images, and the text that each was compared with.

    Raises:
        UserError: the adapter is damaged, was trained on another base model, or has another number of concepts.
    """
    concepts = _learned(entry, adapter_folder)
    prompts = [Prompt(prompt.template, tuple(concepts)) for prompt in entry.prompts]
    generation = Generation(params.base, params.evaluate, concepts)
    pipe = generation.load_base()
    learned = adapter.read(adapter_folder)
    adapter.check_base(pipe, learned)
    adapter.inject(pipe, learned)
    requests = generation.requests(prompts)
    images = generate_images(generation, pipe, requests, customized_subject, entry.key)
    texts = [generation.reference_text(request.prompt) for request in requests]
    embedded, dino = judges.clip.images(images), judges.features([dino_crop(image) for image in images])
    photos = list(instances.values())
    values = {
        "text_alignment": text_alignment(embedded, judges.clip.text(texts)).mean(),
        "image_alignment": np.mean([image_alignment(embedded, judges.clip.images(each)).mean() for each in photos]),
        "dino": np.mean(
            [image_alignment(dino, judges.features([dino_crop(each) for each in own])).mean() for own in photos]
        ),
    }
    return {name: float(value) for name, value in values.items()}, images, texts


def _learned(entry: Entry, adapter_folder: Path) -> dict[str, Concept]:
    """The concepts of an entry under the names and tokens that an adapter has learned them as, in the same order."""
    learned, count = read_config(adapter_folder).concepts, len(entry.concepts)
    if len(learned) != count:
        raise UserError(f"{adapter_folder}: has another number of concepts ({len(learned)}) than {entry.key} ({count})")
    return {
        name: own.model_copy(update={"modifier_token": found.modifier_token})
        for (name, found), own in zip(learned.items(), entry.concepts.values(), strict=True)
    }


def dino_crop(image: Image.Image) -> Image.Image:
    """The part of an image that the authors' script gives DINO; see `DINO_SIDES`."""
    shorter, side = DINO_SIDES
    size = [shorter * length // min(image.size) for length in image.size]
    resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return resized.crop((left, top, left + side, top + side))


def run(
    params: Params, entries: Sequence[Entry], judges: Judges, out: Path, adapters: Path | None = None
) -> dict[str, Scores]:
    """Train and score all entries one after another, with a progress bar; what is in `out` already is skipped.

    Writes `out`/adapters/<entry>, `out`/scores/<entry>/scores.json, and beside it the images in samples/ with their
    texts in prompts.json, which is what the authors' evaluate.py reads.

    Args:
        params: see `protocol`.
        adapters: folder with an adapter for each entry, by its key, instead of training; entries without one are
            left out.

    Returns:
        The scores by entry.
    """
    found = {}
    with tqdm(entries, desc="CustomConcept101", unit="adapter") as bar:
        for entry in bar:
            bar.set_postfix_str(entry.key)
            own, given = params_of(params, entry), adapters / entry.key if adapters else None
            if given and not given.is_dir():
                continue
            settings, folder = _settings(own, given), out / "scores" / entry.key
            if (scores := _done(folder / "scores.json", settings)) is None:
                scores = _run_entry(own, entry, judges, out, given)
                record = {"settings": settings, "scores": scores}
                with atomic_file(folder / "scores.json") as file:
                    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(out / "work" / entry.key)
            found[entry.key] = scores
    return found


def _run_entry(params: Params, entry: Entry, judges: Judges, out: Path, given: Path | None) -> Scores:
    instances, work, folder = {}, out / "work" / entry.key, out / "scores" / entry.key
    for name, concept in params.concepts.items():
        collect(name, concept.source, params.download, work / "instances" / name)
        instances[name] = read_instance_images(work / "instances" / name)
    if given is None:
        learn(params, entry, work, out / "class-images", out / "adapters" / entry.key)
    scores, images, texts = score(params, entry, given or out / "adapters" / entry.key, instances, judges)
    with atomic_directory(folder) as incoming:
        save_all({incoming / "samples" / f"{number:04d}.png": image for number, image in enumerate(images)})
        prompts = {f"{number:04d}": text for number, text in enumerate(texts)}
        (incoming / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    return scores


def _settings(params: Params, given: Path | None) -> str:
    """A hash of everything in params.yaml that determines the scores of an entry, or of its adapter's weights."""
    shared = {"base", "concepts", "download", "evaluate"}
    values: dict[str, Any] = params.model_dump(include=shared | (set() if given else {"prepare", "train", "retrieve"}))
    values["base"].pop("device")
    return _hash(
        values | {"adapter": [sha256(path) for path in sorted(given.glob("*.safetensors"))] if given else None}
    )


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _done(path: Path, settings: str) -> Scores | None:
    """The scores of an earlier run with the same settings; None if there are none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return dict(record["scores"]) if record["settings"] == settings else None
    except (OSError, ValueError, KeyError):
        return None


def means(entries: Sequence[Entry], found: Mapping[str, Scores]) -> dict[str, Scores]:
    """By kind the means over its entries that were scored, and their number."""
    result = {}
    for kind in (SINGLE, JOINT):
        own = [found[entry.key] for entry in entries if entry.kind == kind and entry.key in found]
        if own:
            values = {name: float(np.mean([each[name] for each in own])) for name in METRICS}
            result[kind] = values | {"number": len(own)}
    return result


def table(entries: Sequence[Entry], found: Mapping[str, Scores], steps: int) -> str:
    """The means as a Markdown table, each kind below the row of the authors' table with as many sampler steps."""
    head = ["", "adapters", "text alignment (CLIP)", "image alignment (CLIP)", "image alignment (DINO)"]
    lines = [head, ["---"] * len(head)]
    for kind, values in means(entries, found).items():
        words = "single concept" if kind == SINGLE else "two concepts, trained jointly"
        if (kind, steps) in PAPER:
            lines.append([f"{words}: paper", "101", *(f"{value:.4f}" for value in PAPER[kind, steps])])
        lines.append([f"{words}: customdiff", f"{values['number']:.0f}", *(f"{values[name]:.4f}" for name in METRICS)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def write_results(entries: Sequence[Entry], found: Mapping[str, Scores], steps: int, out: Path) -> None:
    """Write results.json (means, and the paper's), scores.csv (a row per adapter) and table.md."""
    paper = {
        kind: dict(zip(METRICS, PAPER[kind, steps], strict=True)) for kind in (SINGLE, JOINT) if (kind, steps) in PAPER
    }
    summary = {"steps": steps, "customdiff": means(entries, found), "paper": paper}
    with atomic_file(out / "results.json") as file:
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    with atomic_file(out / "table.md") as file:
        file.write_text(table(entries, found, steps), encoding="utf-8")
    with atomic_file(out / "scores.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["adapter", "kind", *METRICS])
        for entry in entries:
            if entry.key in found:
                writer.writerow([entry.key, entry.kind, *(f"{found[entry.key][name]:.6f}" for name in METRICS)])
