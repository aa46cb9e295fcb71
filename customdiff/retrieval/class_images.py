"""Class images: real images of what a concept is one of, that keep the class what it was (prior preservation).

Four backends find them: a clip-retrieval index over a pool (`index`), a clip-retrieval HTTP service (`service`), the
base model itself (`generate`) and a folder (`folder`). All write the layout of the reference's `retrieve.py`, section
3.2 of the paper (Kumari et al. 2023): `images/`, `caption.txt`, `urls.txt`, `images.txt`.
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
from customdiff.config import Download, Params
from customdiff.errors import UserError
from customdiff.retrieval import clip_index, clip_service
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused, SourceImage

QUERY_TEMPLATES = ("a photo of a {}",)  # section 3.1.4 of Radford et al. 2021: a label alone is rarely a caption


@dataclass(frozen=True)
class Found:
    """One class image that a backend found."""

    image: Image.Image
    caption: str
    url: str  # where it came from: a web address, or its name in the pool or folder
    similarity: float | None = None  # cosine to the query
    data: bytes = b""  # what it was decoded from


@dataclass
class Retrieved:
    """What `retrieve` wrote, and what it set aside."""

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
    """Gather a concept's class images into a folder, whole or not at all.

    Writes `images/000000.jpg` or `.png`, ...; `caption.txt`, `urls.txt` and `images.txt` (one line an image, in the
    same order, paths relative to the folder); and `manifest.json`: file, caption, similarity, source and SHA-256 of
    each. Images with exactly the pixels of an instance image, or of one already taken, are left out by every backend.

    Args:
        instances: the folder that download-data wrote for this concept.
        index: the folder that `build_index` wrote; backend index only.
        transport: stands in for the network in tests.

    Raises:
        UserError: the backend cannot be reached or read, or finds fewer than `retrieve.minimum` images.
    """
    backend = params.retrieve.backend
    class_prompt = params.concepts[concept].class_prompt
    result = Retrieved()
    own = instance_images(Path(instances))
    if backend == "index":
        found = from_index(params, class_prompt, own, Path(index), result)
    elif backend == "service":
        found = from_service(params, class_prompt, result, transport)
    elif backend == "generate":
        found = from_base_model(params, class_prompt)
    else:
        found = from_folder(Path(params.retrieve.folder.replace("{}", concept)), class_prompt, params.download, result)
    with files.atomic_directory(out) as folder:
        _write(found, params.retrieve.num_class_images, {pixel_sha256(image) for image in own}, folder, result)
        _check_count(params, concept, result)
    return result


def instance_images(folder: Path) -> list[Image.Image]:
    """The images that download-data wrote.

    Raises:
        UserError: there are none.
    """
    paths = sorted(path for path in folder.glob("*.png") if not image_folder.is_mask(path.name))
    if not paths:
        raise UserError(f"{folder}: holds no instance images; run `dvc repro download-data@{folder.name}` first")
    return [images.open_rgb(path, max_megapixels=float("inf")) for path in paths]


def pixel_sha256(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels: the same for two files that show exactly the same."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _write(found: Iterable[Found], count: int, excluded: set[str], folder: Path, result: Retrieved) -> None:
    (folder / "images").mkdir()
    seen: dict[str, str] = {}
    with tqdm(total=count, desc="class images", unit="image", disable=None) as bar:
        for item in found:
            pixels = pixel_sha256(item.image)
            if pixels in excluded:
                result.set_aside.append(Refused(item.url, "an instance image"))
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
    for name, key in (("caption.txt", "caption"), ("urls.txt", "source"), ("images.txt", "file")):
        (folder / name).write_text("".join(f"{entry[key]}\n" for entry in result.kept), encoding="utf-8")
    manifest = json.dumps({"images": result.kept}, indent=1, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def _check_count(params: Params, concept: str, result: Retrieved) -> None:
    wanted, found = params.retrieve.num_class_images, len(result.kept)
    if found >= wanted:
        return
    mend = {
        "index": "give retrieve.index.pool more images",
        "service": "name another index by retrieve.service.index_name",
        "generate": "lower retrieve.num_class_images",
        "folder": "give retrieve.folder more images",
    }[params.retrieve.backend]
    prompt = params.concepts[concept].class_prompt
    what = f"{found} class images found for {prompt!r} (concepts.{concept}), {wanted} asked for"
    if found < params.retrieve.minimum:
        aside = "; ".join(f"{refused.name}: {refused.reason}" for refused in result.set_aside[:3])
        raise UserError(
            f"{what}, retrieve.minimum is {params.retrieve.minimum}; "
            + (f"{len(result.set_aside)} set aside, such as {aside}; " if aside else "")
            + f"{mend}, or lower retrieve.minimum"
        )
    result.notes.append(f"{what}; {mend} for more")


def query_vector(clip: Any, class_prompt: str) -> np.ndarray:
    """The class prompt's text embedding, averaged over `QUERY_TEMPLATES`: (D,) float32 of norm 1."""
    mean = clip.text([template.format(class_prompt) for template in QUERY_TEMPLATES]).mean(axis=0)
    return mean / np.linalg.norm(mean)


def from_index(
    params: Params, class_prompt: str, own: list[Image.Image], index: Path, result: Retrieved
) -> Iterator[Found]:
    """Images of the pool by falling similarity to the class prompt; near-duplicates and instance images left out."""
    from customdiff.models.clip import Clip

    rows = clip_index.read_rows(index)
    name = params.retrieve.index.clip
    clip = Clip.load(clip_index.OPENAI_NAMES.get(name, name), key="retrieve.index.clip")
    hits = clip_index.query_index(
        index,
        query_vector(clip, class_prompt),
        duplicate_similarity=params.retrieve.duplicate_similarity,
        exclude=clip.images(own),
        caption_weight=params.retrieve.caption_weight,
        embed=clip.text,
    )
    where = Path(params.retrieve.index.pool)
    while batch := list(islice(hits, params.retrieve.num_class_images)):
        items = {item.name: item for item in clip_index.pool_images(where, {rows[hit.row]["name"] for hit in batch})}
        for hit in batch:
            row = rows[hit.row]
            if row["name"] not in items:
                raise UserError(f"retrieve.index.pool: {row['name']} is gone from {where}; run `dvc repro index-pool`")
            yield from _decoded(
                items[row["name"]], row["caption"] or class_prompt, hit.similarity, params.download, result
            )


def _decoded(
    item: SourceImage, caption: str, similarity: float | None, limits: Download, result: Retrieved
) -> Iterator[Found]:
    """One image, decoded; none where it is set aside."""
    try:
        image = images.limit_side(image_folder.decode(item, limits.max_megapixels), limits.max_side)
    except images.ImageError as error:
        result.set_aside.append(Refused(item.name, error.reason))
    else:
        yield Found(image, caption, item.name, similarity, item.data)


def from_folder(folder: Path, class_prompt: str, limits: Download, result: Retrieved) -> Iterator[Found]:
    """The images of a folder in natural order; where no caption lies beside one, the class prompt is its caption."""
    names = [name for name in image_folder.walk(folder) if image_folder.is_image(name)]
    if not names:
        raise UserError(f"retrieve.folder: no image lies in {folder}; give images with .txt captions beside them")
    for item in image_folder.folder_images(folder, names, limits.max_megabytes):
        yield from _decoded(item, item.caption or class_prompt, None, limits, result)


def from_base_model(params: Params, class_prompt: str) -> Iterator[Found]:
    """Images that the base model draws from the class prompt, each from a seed of its own."""
    from customdiff.models import base, sampling

    generate = params.retrieve.generate
    count = params.retrieve.num_class_images
    device = base.device(params.base.device)
    pipe = base.load_pipeline(params.base, dtype=base.DTYPES[generate.precision], device=device)
    seeds = [sampling.image_seed(params.base.seed, class_prompt, number) for number in range(count)]
    drawn = sampling.generate(
        pipe,
        [class_prompt] * count,
        seeds,
        steps=generate.steps,
        guidance_scale=generate.guidance_scale,
        batch_size=generate.batch_size,
        progress="drawing class images",
    )
    for seed, image in zip(seeds, drawn, strict=True):
        yield Found(image.convert("RGB"), class_prompt, f"{params.base.model} seed {seed}")


def from_service(
    params: Params, class_prompt: str, result: Retrieved, transport: httpx.BaseTransport | None = None
) -> Iterator[Found]:
    """Images that a clip-retrieval HTTP service names, in its order; see service.py."""
    answers = clip_service.service_images(
        params.retrieve.service, class_prompt, params.retrieve.num_class_images, transport=transport
    )
    for item, similarity in answers:
        yield from _decoded(item, item.caption or class_prompt, similarity, params.download, result)
