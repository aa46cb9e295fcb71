"""Class images for prior preservation: images of the class that a concept belongs to.

Four backends find them: a clip-retrieval index over a pool (`index`), a clip-retrieval HTTP service (`service`), the
base model itself (`generate`) and a folder (`folder`). All write the layout of the reference's `retrieve.py`
(section 3.2 of Kumari et al. 2023): `images/`, `caption.txt`, `urls.txt`, `images.txt`.

The nearest images of a pool need not show the class. `retrieve.min_similarity` keeps those whose caption names the
class or whose cosine reaches it, and `retrieve.fill` decides what happens if too few are left. The reference's
`retrieve.py` has no floor; the paper keeps images whose caption has a cosine above 0.85 to the prompt, in CLIP's text
space.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
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
from customdiff.retrieval.naming import names_class
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused, SourceImage
from customdiff.sources.instance_images import read_instance_images

QUERY_TEMPLATES = ("a photo of a {}",)  # section 3.1.4 of Radford et al. 2021: a label alone is rarely a caption


@dataclass(frozen=True)
class ClassImage:
    """One class image that a backend found."""

    image: Image.Image
    caption: str | None  # its own; None: it is captioned with the class prompt
    url: str  # origin: a web address, or the name in the pool or folder
    similarity: float | None = None  # cosine to the query
    data: bytes = b""  # the encoded image, if there was one
    generated: bool = False  # by the base model


@dataclass
class Retrieved:
    """What `retrieve` wrote.

    Attributes:
        class_prompt: the class.
        kept: manifest entries of the images.
        set_aside: images skipped.
        notes: warnings.
        captions: number of images that were found with a caption of their own.
        captions_naming_class: how many of these captions name the class (`naming.names_class`).
        generated: number of images that the base model generated.
    """

    class_prompt: str
    kept: list[dict[str, Any]] = field(default_factory=list)
    set_aside: list[Refused] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    captions: int = 0
    captions_naming_class: int = 0
    generated: int = 0

    @property
    def origin(self) -> str:
        """How many captions name the class, how many images have no caption, and how many are generated."""
        uncaptioned = len(self.kept) - self.captions - self.generated
        parts = []
        if self.captions:
            parts.append(f"{self.captions_naming_class} of {self.captions} captions name {self.class_prompt!r}")
        if uncaptioned:
            parts.append(f"{uncaptioned} images without a caption")
        if self.generated:
            parts.append(f"{self.generated} images generated from {self.class_prompt!r}")
        return ", ".join(parts)


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
    same order, paths relative to the folder); and `manifest.json`: how many captions name the class, and file, caption,
    similarity, source and SHA-256 of each image. With every backend, an image is skipped if its pixels equal those of
    an instance image or of an earlier class image.

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
    result = Retrieved(class_prompt)
    keep = _floor(section.min_similarity, class_prompt)
    own = read_instance_images(instances)
    if section.backend == "index":
        found = from_index(section, limits, class_prompt, own, Path(index), keep, result)
    elif section.backend == "service":
        found = from_service(section.service, limits, class_prompt, section.num_class_images, keep, result, transport)
    elif section.backend == "generate":
        found = from_base_model(params.base, section, class_prompt, section.num_class_images)
    else:
        found = from_folder(Path(section.folder.replace("{}", concept)), limits, result)
    if section.fill == "generate" and section.backend != "generate":
        found = _filled(found, params.base, section, result)
    with files.atomic_directory(out) as folder:
        _write(found, section.num_class_images, {pixel_sha256(image) for image in own}, folder, result)
        _check_count(section, f"{class_prompt!r} (concepts.{concept})", result)
    _check_captions(section, result)
    return result


def _floor(min_similarity: float | None, class_prompt: str) -> Callable[[str, float | None], bool] | None:
    """Whether an image is kept, from its caption and its cosine to the query; None: there is no floor.

    The cosine is that of the image alone, also if `retrieve.caption_weight` ranks by the caption as well: the caption
    is judged by its words.
    """
    if min_similarity is None:
        return None
    named = names_class(class_prompt)

    def keep(caption: str, similarity: float | None) -> bool:
        return named(caption) or (similarity is not None and similarity >= min_similarity)

    return keep


def _filled(found: Iterable[ClassImage], base: Base, retrieve: Retrieve, result: Retrieved) -> Iterator[ClassImage]:
    """The images that were found, then generated ones in place of those that are missing."""
    yield from found
    if missing := retrieve.num_class_images - len(result.kept):
        yield from from_base_model(base, retrieve, result.class_prompt, missing)


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
        _write_lists([], folder, {})
        (folder / "README.txt").write_text(f"{reason}\n", encoding="utf-8")
    return reason


def pixel_sha256(image: Image.Image) -> str:
    """SHA-256 of an RGB image's size and pixels, which does not depend on the file format."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).hexdigest()


def _write(found: Iterable[ClassImage], count: int, excluded: set[str], folder: Path, result: Retrieved) -> None:
    """Write the first `count` images that are neither excluded nor duplicates."""
    (folder / "images").mkdir()
    seen: dict[str, str] = {}
    named = names_class(result.class_prompt)
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
            caption = image_folder.one_line(item.caption or "")
            result.generated += item.generated
            result.captions += caption is not None
            result.captions_naming_class += caption is not None and named(caption)
            path = images.save(item.image, folder / "images" / f"{len(result.kept):06}", source=item.data)
            result.kept.append(
                {
                    "file": path.relative_to(folder).as_posix(),
                    "caption": caption or result.class_prompt,
                    "similarity": None if item.similarity is None else round(item.similarity, 6),
                    "source": image_folder.one_line(item.url) or "",
                    "sha256": files.sha256(path),
                }
            )
            bar.update()
            if len(result.kept) == count:
                break
    counts = ("class_prompt", "captions", "captions_naming_class", "generated")
    _write_lists(result.kept, folder, {name: getattr(result, name) for name in counts})


def _write_lists(kept: list[dict[str, Any]], folder: Path, counts: dict[str, Any]) -> None:
    """Write the reference's three lists, and the manifest, which starts with `counts`."""
    for name, key in (("caption.txt", "caption"), ("urls.txt", "source"), ("images.txt", "file")):
        (folder / name).write_text("".join(f"{entry[key]}\n" for entry in kept), encoding="utf-8")
    manifest = json.dumps({**counts, "images": kept}, indent=1, ensure_ascii=False) + "\n"
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
    if not retrieve.generates:
        fix += ", or set retrieve.fill: generate"
    summary = f"{found} class images found for {wanted}, retrieve.num_class_images is {retrieve.num_class_images}"
    if retrieve.backend in ("index", "service") and retrieve.min_similarity is not None:
        summary += f" (with retrieve.min_similarity: {retrieve.min_similarity:g})"
    if found < retrieve.minimum:
        aside = "; ".join(f"{refused.name}: {refused.reason}" for refused in result.set_aside[:3])
        raise UserError(
            f"{summary}, retrieve.minimum is {retrieve.minimum}; "
            + (f"{len(result.set_aside)} set aside, such as {aside}; " if aside else "")
            + f"{fix}, or lower retrieve.minimum"
        )
    result.notes.append(f"{summary}; to get more, {fix}")


def _check_captions(retrieve: Retrieve, result: Retrieved) -> None:
    """Warn if fewer than half of the captions name the class."""
    if 2 * result.captions_naming_class >= result.captions:
        return
    fix = "check the images of retrieve.folder"
    if retrieve.backend != "folder":
        verb = "set" if retrieve.min_similarity is None else "raise"
        fix = f"{verb} retrieve.min_similarity (1: only images whose caption names the class)"
    result.notes.append(f"{result.origin}; the other images may not show the class: {fix}")


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
    keep: Callable[[str, float], bool] | None,
    result: Retrieved,
) -> Iterator[ClassImage]:
    """Images of the pool by descending similarity to the class prompt.

    Near-duplicates of each other and of the instance images `own` are skipped, and images that `keep` refuses.

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
        keep=keep,
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
            yield from _decoded(items[row["name"]], row["caption"], hit.similarity, limits, result)


def _decoded(
    item: SourceImage, caption: str | None, similarity: float | None, limits: Download, result: Retrieved
) -> Iterator[ClassImage]:
    """One image, decoded; nothing if it is skipped."""
    try:
        image = images.limit_side(image_folder.decode(item, limits.max_megapixels), limits.max_side)
    except images.ImageError as error:
        result.set_aside.append(Refused(item.name, error.reason))
    else:
        yield ClassImage(image, caption, item.name, similarity, item.data)


def from_folder(folder: Path, limits: Download, result: Retrieved) -> Iterator[ClassImage]:
    """The images of a folder in natural order, with the captions beside them.

    Raises:
        UserError: the folder has no images.
    """
    names = [name for name in image_folder.walk(folder) if image_folder.is_image(name)]
    if not names:
        raise UserError(f"retrieve.folder: no images in {folder}; give images with .txt captions")
    for item in image_folder.folder_images(folder, names, limits.max_megabytes):
        yield from _decoded(item, item.caption, None, limits, result)


def from_base_model(base_model: Base, retrieve: Retrieve, class_prompt: str, count: int) -> Iterator[ClassImage]:
    """Images that the base model generates from the class prompt, each from its own seed."""
    from customdiff.models import base, sampling

    generate = retrieve.generate
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
        yield ClassImage(image.convert("RGB"), None, f"{base_model.model} seed {seed}", generated=True)


def from_service(
    service: Service,
    limits: Download,
    class_prompt: str,
    count: int,
    keep: Callable[[str, float | None], bool] | None,
    result: Retrieved,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[ClassImage]:
    """Images that a clip-retrieval HTTP service finds and `keep` accepts; see `clip_service.service_images`.

    Raises:
        UserError: the service cannot be reached, or its response is not that of a clip-retrieval service.
    """
    embedding = None
    if service.clip:
        from customdiff.models.clip import Clip

        clip = Clip.load(clip_tool.OPENAI_NAMES.get(service.clip, service.clip), key="retrieve.service.clip")
        embedding = query_vector(clip, class_prompt).tolist()
    found = clip_service.service_images(
        service, class_prompt, count, embedding=embedding, keep=keep, transport=transport
    )
    for item, similarity in found:
        yield from _decoded(item, item.caption, similarity, limits, result)
