"""The inputs of each stage: the parameters it reads, defaults included, and hashes of the files that they name.

DVC tracks the files that this module writes, one per stage and concept. A stage therefore reruns when a parameter that
it reads changes, in params.yaml or as a default in the schema, and when a file that the parameters name changes,
wherever it lies. Paths that a backend or method does not use are not among its inputs.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from customdiff.config import Base, Concept, Params
from customdiff.files import atomic_directory, atomic_file, locked, project_home, sha256
from customdiff.redaction import redact_values

FOLDER = Path("data/inputs")
# Folders in data/ with an output per concept, and the file by which an output is recognized.
MANIFESTS = {"instances": "manifest.json", "classes": "manifest.json", "prepared": "instance.json"}
HASHES = ".input-hashes.json"  # hashes of files by path, size and time, so that large models are hashed once

Inputs = dict[str, Any]


def write_inputs(params: Params, folder: Path = FOLDER) -> list[Path]:
    """Write `<stage>.json`, or `<stage>/<concept>.json` for stages that run once per concept; returns the paths."""
    hashes = FileHashes(project_home() / HASHES)
    inputs = {"index-pool": index_pool(params, hashes), "train": train(params, hashes)}
    inputs["evaluate"] = evaluate(params, hashes)
    for name, concept in params.concepts.items():
        inputs[f"download-data/{name}"] = download_data(params, concept, hashes)
        inputs[f"retrieve-class-images/{name}"] = retrieve_class_images(params, name, hashes)
        inputs[f"prepare/{name}"] = prepare(params, name, hashes)
    with atomic_directory(folder) as out:
        for name, values in inputs.items():
            path = out / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    hashes.save()
    return [folder / f"{name}.json" for name in inputs]


def set_former_concepts_aside(concepts: Collection[str], data: Path = Path("data")) -> None:
    """Move the outputs of concepts that params.yaml no longer names to `<data>/former`, and back once it names them.

    `train` and `evaluate` depend on the outputs of all concepts together. With those of former ones, DVC would record a
    hash that no clone can have, and train again there. Folders without a stage's manifest stay where they are.
    """
    for kind, manifest in MANIFESTS.items():
        current, former = data / kind, data / "former" / kind
        for path in sorted(current.glob(f"[!.]*/{manifest}")):
            if path.parent.name not in concepts:
                _move(path.parent, former / path.parent.name)
        for name in concepts:
            if (former / name).is_dir() and not (current / name).exists():
                _move(former / name, current / name)


def _move(folder: Path, to: Path) -> None:
    with locked(folder), locked(to):
        shutil.rmtree(to, ignore_errors=True)
        folder.rename(to)


def download_data(params: Params, concept: Concept, hashes: "FileHashes") -> Inputs:
    """Inputs of `download-data`: the source and its files, and the limits; without secrets, because DVC shares them."""
    return {
        "source": redact_values(concept.source.model_dump()),
        "download": params.download.model_dump(),
        "files": hashes.of(concept.source.path),
    }


def index_pool(params: Params, hashes: "FileHashes") -> Inputs:
    """Inputs of `index-pool`: pool and CLIP; for other backends only their name."""
    retrieve = params.retrieve
    if retrieve.backend != "index" or not params.train.preserves_prior:
        return {"backend": retrieve.backend, "class images": params.train.preserves_prior}
    return {
        "index": retrieve.index.model_dump(),
        "max_megapixels": params.download.max_megapixels,
        "files": hashes.of(retrieve.index.pool, retrieve.index.clip),
    }


def retrieve_class_images(params: Params, name: str, hashes: "FileHashes") -> Inputs:
    """Inputs of `retrieve-class-images`: class, backend and its section; none if no class images are used."""
    retrieve = params.retrieve
    if not params.train.preserves_prior:
        return {"class images": False}
    unused = {"index", "service", "generate", "folder"} - {retrieve.backend}
    if retrieve.generates:
        unused.discard("generate")
    if retrieve.backend == "generate":
        unused.add("fill")
    if retrieve.backend not in ("index", "service"):
        unused.add("min_similarity")
    inputs: Inputs = {
        "class_prompt": params.concepts[name].class_prompt,
        "retrieve": redact_values(retrieve.model_dump(exclude=unused)),
        "download": params.download.model_dump(),
    }
    if retrieve.generates:
        inputs |= _base(params.base, hashes)
    if retrieve.backend == "index":
        inputs["files"] = hashes.of(retrieve.index.clip)
    if retrieve.backend == "service":
        inputs["files"] = hashes.of(retrieve.service.clip)
    if retrieve.backend == "folder":
        inputs["files"] = hashes.of(retrieve.folder.replace("{}", name))
    return inputs


def prepare(params: Params, name: str, hashes: "FileHashes") -> Inputs:
    """Inputs of `prepare`: prompts of the concept, section `prepare`, the captioner and the base model.

    Also the prompts of the other concepts that its subject is shown beside.
    """
    include = {"modifier_token", "class_prompt", "instance_prompt"}
    words = {each: concept.model_dump(include=include) for each, concept in params.concepts.items()}
    return {
        "concept": words.pop(name),
        "together with": words if params.prepare.together else {},
        "prepare": params.prepare.model_dump(),
        "class images": params.train.preserves_prior,
        "captioner": hashes.of(params.prepare.captioning_model),
        "segmenter": hashes.of(params.prepare.segmentation_model),
        "background images": hashes.of(params.prepare.backgrounds.images),
        "masked loss": params.train.mask_weight != 1,
        **_base(params.base, hashes),
    }


def train(params: Params, hashes: "FileHashes") -> Inputs:
    """Inputs of `train`: sections `train` and `concepts`, without their folders of images, and the base model.

    Also the judges of `evaluate` if checkpoints are graded.
    """
    config_file, folders = params.train.launch.config_file, {"source", "holdout"}
    judges = {"clip", "identity"} if params.train.grades_checkpoints else set()
    return {
        "train": params.train.model_dump(),
        "prepare": params.prepare.model_dump(include={"resolution", "cache_latents"}),
        "concepts": {name: concept.model_dump(exclude=folders) for name, concept in params.concepts.items()},
        "launch": hashes.of(config_file),
        "judges": params.evaluate.model_dump(include=judges),
        "judge files": hashes.of(*(getattr(params.evaluate, name) for name in sorted(judges))),
        **_base(params.base, hashes),
    }


def evaluate(params: Params, hashes: "FileHashes") -> Inputs:
    """Inputs of `evaluate`: its section, prompts, judges and holdout photos, each concept's words, and the base model.

    Also the parameters of the training that `evaluation.verdict` names in the next step.
    """
    words = {"modifier_token", "class_prompt", "holdout"}
    judges = (params.evaluate.clip, params.evaluate.identity, params.evaluation_segmenter)
    holdout = [concept.holdout for concept in params.concepts.values()]
    prior = {"method", "with_prior_preservation", "prior_loss_weight"}
    return {
        "evaluate": params.evaluate.model_dump(),
        "train": params.train.model_dump(include={"max_steps", "learning_rate"} | prior),
        "prepare": params.prepare.model_dump(include={"captions": True, "masks": True, "backgrounds": {"share"}}),
        "segmenter": params.evaluation_segmenter,  # a folder's content is among the files; a name on the Hub is not
        "concepts": {name: concept.model_dump(include=words) for name, concept in params.concepts.items()},
        "download": params.download.model_dump(include={"max_side", "max_megapixels"}),
        "files": hashes.of(params.evaluate.prompts, *judges, *holdout),
        **_base(params.base, hashes),
    }


def _base(base: Base, hashes: "FileHashes") -> Inputs:
    """The base model and the seed; `device` is excluded, because it does not change tracked results."""
    return {"base": base.model_dump(exclude={"device"}), "base files": hashes.of(base.model)}


class FileHashes:
    """SHA-256 hashes of files and folders, cached by size and modification time.

    Args:
        path: file of the cache.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._used: dict[str, list] = {}

    def of(self, *names: str | None) -> dict[str, str]:
        """Hashes of local files and folders by name; other names, such as Hub repositories, are omitted."""
        return {name: self._tree(Path(name)) for name in names if name and Path(name).exists()}

    def save(self) -> None:
        """Write the hashes that were used to the cache."""
        with atomic_file(self.path) as incoming:
            incoming.write_text(json.dumps(self._used), encoding="utf-8")

    def _tree(self, path: Path) -> str:
        if path.is_file():
            return self._file(path)
        digest = hashlib.sha256()
        for file in sorted(entry for entry in path.rglob("*") if entry.is_file() and not _is_hidden(entry, path)):
            name = os.fsencode(file.relative_to(path).as_posix())  # also a name that is not UTF-8
            digest.update(name + f"\0{self._file(file)}\n".encode())
        return digest.hexdigest()

    def _file(self, path: Path) -> str:
        status, key = path.stat(), str(path.resolve())
        size, modified, known = self._known.get(key, (None, None, ""))
        if (size, modified) != (status.st_size, status.st_mtime_ns):
            known = sha256(path)
        self._used[key] = [status.st_size, status.st_mtime_ns, known]
        return known


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
