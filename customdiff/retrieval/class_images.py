"""Class images for prior preservation: images of the class that a concept belongs to.

Four backends find them: a clip-retrieval index over a pool (`index`), a clip-retrieval HTTP service (`service`), the
base model itself (`generate`) and a folder (`folder`). All write the layout of the reference's `retrieve.py`
(section 3.2 of Kumari et al. 2023): `images/`, `caption.txt`, `urls.txt`, `images.txt`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from customdiff import files, images
from customdiff.config import Base, Download, Params, Retrieve, Service, Train
from customdiff.errors import UserError
from customdiff.retrieval import clip_index, clip_service, clip_tool
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused, SourceImage
from customdiff.sources.instance_images import read_instance_images

QUERY_TEMPLATES = ("a photo of a {}",)  # section 3.1.4 of Radford et al. 2021: a label alone is rarely a caption


@dataclass(frozen=True)
class ClassImage:
    """One class image that a backend found."""

    image: Image.Image
    caption: str
    url: str  # origin: a web address, or the name in the pool or folder
    similarity: float | None = None  # cosine to the query
    data: bytes = b""  # the encoded image, if there was one


@dataclass
class Retrieved:
    """What `retrieve` wrote: manifest entries of the images kept, images skipped, and warnings."""

    kept: list[dict[str, Any]] = field(default_factory=list)
    set_aside: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def retrieve(
    params: Params,
    concept: str,
    *,
    instances: Path | str,
    index: Path | str,
    out: Path | str,
    transport: httpx.BaseTransport | None = None,
) -> Retrieved:
    """Gather a concept's class images in a folder, which is replaced as a whole or left as it was.

    Writes `images/000000.jpg` or `.png`, ...; `caption.txt`, `urls.txt` and `images.txt` (one line per image, in the
    same order, paths relative to the folder); and `manifest.json`: file, caption, similarity, source and SHA-256 of
    each image. With every backend, an image is skipped if its pixels equal those of an instance image or of an earlier
    class image.

    Args:
        instances: the folder that download-data wrote for this concept.
        index: the folder that `build_index` wrote; backend index only.
        out: folder to write.
        transport: replaces the network in tests.

    Raises:
        UserError: the backend cannot be reached or read, or finds fewer than `retrieve.minimum` images.
    """
    section, limits = params.retrieve, params.download
    class_prompt = params.concepts[concept].class_prompt
    result = Retrieved()
    own = read_instance_images(instances)
    if section.backend == "index":
        found = from_index(section, limits, class_prompt, own, Path(index), result)
    elif section.backend == "service":
        found = from_service(section.service, limits, class_prompt, section.num_class_images, result, transport)
    elif section.backend == "generate":
        found = from_base_model(params.base, section, class_prompt)
    else:
        found = from_folder(Path(section.folder.replace("{}", concept)), class_prompt, limits, result)
    with files.atomic_directory(out) as folder:
        _write(found, section.num_class_images, {pixel_sha256(image) for image in own}, folder, result)
        _check_count(section, f"{class_prompt!r} (concepts.{concept})", result)
    return result


def write_unused(train: Train, out: Path | str) -> str:
    """Write the output of `retrieve` without any images, for training that uses no class images.

    Writes empty `caption.txt`, `urls.txt` and `images.txt`, a manifest without images, and `README.txt` with the
    reason. Loads no model and no index. DVC needs the folder as the stage's output.

    Args:
        train: settings of a training whose `preserves_prior` is False.
        out: folder to write.

    Returns:
        The reason, one sentence that names the key of params.yaml.
    """
    key = "method: textual_inversion" if train.method == "textual_inversion" else "with_prior_preservation: false"
    reason = f"train.{key} uses no class images."
    with files.atomic_directory(out) as folder:
        _write_lists([], folder)
        (folder / "README.txt").write_text(f"{reason}\n", encoding="utf-8")
    return reason


def pixel_sha256(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels, which does not depend on the file format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _write(found: Iterable[ClassImage], count: int, excluded: set[str], folder: Path, result: Retrieved) -> None:
    """Write the first `count` images that are neither excluded nor duplicates."""
    (folder / "images").mkdir()
    seen: dict[str, str] = {}
    with tqdm(total=count, desc="class images", unit="image", disable=None) as bar:
        for item in found:
            pixels = pixel_sha256(item.image)
            if pixels in excluded:
                result.set_aside.append(Refused(item.url, "the same pixels as an instance image"))
                continue
            if pixels in seen:
                result.set_aside.append(Refused(item.url, f"the same pixels as {seen[pixels]}"))
                continue
            seen[pixels] = item.url
            path = images.save(item.image, folder / "images" / f"{len(result.kept):06}", source=item.data)
            result.kept.append(
                {
                    "file": path.relative_to(folder).as_posix(),
                    "caption": image_folder.one_line(item.caption) or "",
                    "similarity": None if item.similarity is None else round(item.similarity, 6),
                    "source": image_folder.one_line(item.url) or "",
                    "sha256": files.sha256(path),
                }
            )
            bar.update()
            if len(result.kept) == count:
                break
    _write_lists(result.kept, folder)


def _write_lists(kept: list[dict[str, Any]], folder: Path) -> None:
    """Write the reference's three lists, and the manifest."""
    for name, key in (("caption.txt", "caption"), ("urls.txt", "source"), ("images.txt", "file")):
        (folder / name).write_text("".join(f"{entry[key]}\n" for entry in kept), encoding="utf-8")
    manifest = json.dumps({"images": kept}, indent=1, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def _check_count(retrieve: Retrieve, wanted: str, result: Retrieved) -> None:
    """Compare the number of images with what was requested for `wanted`: an error below the minimum, else a warning."""
    found = len(result.kept)
    if found >= retrieve.num_class_images:
        return
    fix = {
        "index": "add images to retrieve.index.pool",
        "service": "set retrieve.service.index_name to another index",
        "generate": "lower retrieve.num_class_images",
        "folder": "add images to retrieve.folder",
    }[retrieve.backend]
    summary = f"{found} class images found for {wanted}, retrieve.num_class_images is {retrieve.num_class_images}"
    if found < retrieve.minimum:
        aside = "; ".join(f"{refused.name}: {refused.reason}" for refused in result.set_aside[:3])
        raise UserError(
            f"{summary}, retrieve.minimum is {retrieve.minimum}; "
            + (f"{len(result.set_aside)} set aside, such as {aside}; " if aside else "")
            + f"{fix}, or lower retrieve.minimum"
        )
    result.notes.append(f"{summary}; to get more, {fix}")


def query_vector(clip: Any, class_prompt: str) -> np.ndarray:
    """The class prompt's text embedding, averaged over `QUERY_TEMPLATES`: (D,) float32 of norm 1.

    Args:
        clip: a `models.clip.Clip`, which is not imported here because it imports torch.
    """
    mean = clip.text([template.format(class_prompt) for template in QUERY_TEMPLATES]).mean(axis=0)
    return mean / np.linalg.norm(mean)


def from_index(
    retrieve: Retrieve,
    limits: Download,
    class_prompt: str,
    own: list[Image.Image],
    index: Path,
    result: Retrieved,
) -> Iterator[ClassImage]:
    """Images of the pool by descending similarity to the class prompt.

    Near-duplicates of each other and of the instance images `own` are skipped.

    Raises:
        UserError: there is no index, it was built with another CLIP, or the pool has changed since.
    """
    from customdiff.models.clip import Clip

    rows = clip_index.read_rows(index)
    name = retrieve.index.clip
    clip = Clip.load(clip_tool.OPENAI_NAMES.get(name, name), key="retrieve.index.clip")
    hits = clip_index.query_index(
        index,
        query_vector(clip, class_prompt),
        duplicate_similarity=retrieve.duplicate_similarity,
        exclude=clip.images(own),
        caption_weight=retrieve.caption_weight,
        embed=clip.text,
    )
    pool = Path(retrieve.index.pool)
    while batch := list(islice(hits, retrieve.num_class_images)):
        items = {item.name: item for item in clip_index.pool_images(pool, {rows[hit.row]["name"] for hit in batch})}
        for hit in batch:
            row = rows[hit.row]
            if row["name"] not in items:
                raise UserError(
                    f"retrieve.index.pool: {row['name']} is no longer in {pool}; run `dvc repro index-pool`"
                )
            yield from _decoded(items[row["name"]], row["caption"] or class_prompt, hit.similarity, limits, result)


def _decoded(
    item: SourceImage, caption: str, similarity: float | None, limits: Download, result: Retrieved
) -> Iterator[ClassImage]:
    """One image, decoded; nothing if it is skipped."""
    try:
        image = images.limit_side(image_folder.decode(item, limits.max_megapixels), limits.max_side)
    except images.ImageError as error:
        result.set_aside.append(Refused(item.name, error.reason))
    else:
        yield ClassImage(image, caption, item.name, similarity, item.data)


def from_folder(folder: Path, class_prompt: str, limits: Download, result: Retrieved) -> Iterator[ClassImage]:
    """The images of a folder in natural order; an image without a caption file gets the class prompt as its caption.

    Raises:
        UserError: the folder has no images.
    """
    names = [name for name in image_folder.walk(folder) if image_folder.is_image(name)]
    if not names:
        raise UserError(f"retrieve.folder: no images in {folder}; give images with .txt captions")
    for item in image_folder.folder_images(folder, names, limits.max_megabytes):
        yield from _decoded(item, item.caption or class_prompt, None, limits, result)


def from_base_model(base_model: Base, retrieve: Retrieve, class_prompt: str) -> Iterator[ClassImage]:
    """Images that the base model generates from the class prompt, each from its own seed."""
    from customdiff.models import base, sampling

    generate, count = retrieve.generate, retrieve.num_class_images
    device = base.device(base_model.device)
    pipe = base.load_pipeline(base_model, dtype=base.DTYPES[generate.precision], device=device)
    seeds = [sampling.image_seed(base_model.seed, class_prompt, number) for number in range(count)]
    generated = sampling.generate(
        pipe,
        [class_prompt] * count,
        seeds,
        steps=generate.steps,
        guidance_scale=generate.guidance_scale,
        batch_size=generate.batch_size,
        progress="generating class images",
    )
    for seed, image in zip(seeds, generated, strict=True):
        yield ClassImage(image.convert("RGB"), class_prompt, f"{base_model.model} seed {seed}")


def from_service(
    service: Service,
    limits: Download,
    class_prompt: str,
    count: int,
    result: Retrieved,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[ClassImage]:
    """Images that a clip-retrieval HTTP service finds, in its order; see `clip_service.service_images`.

    Raises:
        UserError: the service cannot be reached, or its response is not that of a clip-retrieval service.
    """
    for item, similarity in clip_service.service_images(service, class_prompt, count, transport=transport):
        yield from _decoded(item, item.caption or class_prompt, similarity, limits, result)
