"""Index of CLIP embeddings over a pool of captioned images: read the pool, build the index, query it.

The index is in clip-retrieval's format and is built by its command line (clip_tool.py). A query compares all
embeddings exactly: the pipeline makes one query per concept, and comparing a million embeddings takes less time
than building an approximate index of them.
"""

import json
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from customdiff import files, images
from customdiff.errors import UserError, printable
from customdiff.retrieval import clip_tool
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused, SourceImage

MAX_IMAGE_BYTES = 32_000_000
EMBEDDINGS = "img_emb/img_emb_0.npy"  # clip-retrieval's file name
ROWS_AT_ONCE = 16_384


def pool_images(pool: Path, wanted: set[str] | None = None) -> Iterator[SourceImage]:
    """The images of a pool, undecoded, with their captions; names and order are the same on every machine.

    Args:
        pool: a folder of images with `.txt` captions, a folder of tars of such pairs (webdataset), or one such tar.
        wanted: read only the images of these names.

    Raises:
        UserError: there is no such pool, or a tar cannot be read.
    """
    if pool.is_file():
        yield from _tar_images(pool, pool.name, wanted)
        return
    if not pool.is_dir():
        raise UserError(
            f"retrieve.index.pool: {pool} does not exist; give a folder of images with .txt captions, a folder of "
            "webdataset tars, or one tar"
        )
    names = image_folder.walk(pool)
    loose = [name for name in names if image_folder.is_image(name) and (wanted is None or printable(name) in wanted)]
    yield from image_folder.folder_images(pool, loose, max_megabytes=MAX_IMAGE_BYTES / 1e6)
    for name in names:
        if name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            yield from _tar_images(pool / name, name, wanted)


def _tar_images(tar: Path, label: str, wanted: set[str] | None) -> Iterator[SourceImage]:
    """Images of a webdataset tar, in which the files of a sample share their name up to the first dot."""
    if wanted is not None and not any(name.startswith(f"{label}/") for name in wanted):
        return
    try:
        with tarfile.open(tar) as opened:
            members = [member for member in opened if member.isreg() and not member.issparse()]
            captions = {_sample(member.name): member for member in members if member.name.lower().endswith(".txt")}
            for member in members:
                name = f"{label}/{printable(member.name.removeprefix('./'))}"
                if not image_folder.is_image(member.name) or (wanted is not None and name not in wanted):
                    continue
                if member.size > MAX_IMAGE_BYTES:
                    yield SourceImage(name, b"", problem=f"file above {MAX_IMAGE_BYTES / 1e6:g} MB")
                    continue
                caption = captions.get(_sample(member.name))
                text = _read(opened, caption, image_folder.MAX_CAPTION_BYTES) if caption else b""
                yield SourceImage(name, _read(opened, member), image_folder.one_line(text))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"retrieve.index.pool: {tar} cannot be read ({images.brief(error)})") from error


def _read(opened: tarfile.TarFile, member: tarfile.TarInfo, size: int = -1) -> bytes:
    """The first `size` bytes of a regular file of a tar, or all of them."""
    file = opened.extractfile(member)
    return file.read(size) if file else b""


def _sample(name: str) -> str:
    path = PurePosixPath(name)
    return f"{path.parent}/{path.name.partition('.')[0]}"


@dataclass
class Indexed:
    """What `build_index` wrote: number of images, images skipped, and seconds per step."""

    count: int = 0
    set_aside: list[Refused] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def build_index(pool: Path | str, clip: str, out: Path | str, *, max_megapixels: float = 64) -> Indexed:
    """Embed a pool with `clip-retrieval inference`, which runs in its own environment.

    Writes `img_emb/img_emb_0.npy` ((N, D) float16, unit norm), `rows.json` (name in the pool and caption of each row)
    and `metadata/metadata_0.parquet`. `clip-retrieval index` reads these files as they are, to serve the pool.

    Args:
        pool: see `pool_images`.
        clip: a CLIP folder, a Hub repository, or one of OpenAI's names such as ViT-B/32.
        max_megapixels: larger images are skipped.

    Raises:
        UserError: the pool, the CLIP or clip-retrieval is missing or fails.
    """
    pool, out, result = Path(pool), Path(out), Indexed()
    command = clip_tool.command()
    with files.atomic_directory(out) as folder, files.work_directory(out) as work:
        with _timed(result, "prepare images"):
            staged = _stage(pool, work / "images", max_megapixels, result)
        model = clip_tool.model_argument(clip, work / "clip")
        with _timed(result, "clip-retrieval inference"):
            # `clip-retrieval inference` starts this worker beside a process that only shows progress.
            embed = ["inference.worker", "--tasks=[0]", "--output_partition_count=1", "--num_prepro_workers=0"]
            embed += ["--input_dataset=images", "--input_format=files", "--output_folder=embedded"]
            embed += [f"--clip_model={model}", "--enable_text=False", "--use_jit=False"]
            embed += [f"--batch_size={min(32, len(staged))}"]
            clip_tool.run(command, embed, work)
        _gather(work, folder, pool, staged, result)
    return result


def _stage(pool: Path, folder: Path, max_megapixels: float, result: Indexed) -> dict[str, SourceImage]:
    """Write the pool's readable images under numbers, decoded; returns their names and captions by file name."""
    folder.mkdir()
    staged: dict[str, SourceImage] = {}
    for item in tqdm(pool_images(pool), desc="pool", unit="image", disable=None):
        try:
            image = image_folder.decode(item, max_megapixels)
        except images.ImageError as error:
            result.set_aside.append(Refused(item.name, error.reason))
            continue
        path = images.save(image, folder / f"{len(staged):08}", source=item.data)
        staged[path.name] = SourceImage(item.name, b"", item.caption)
    if not staged:
        raise UserError(f"retrieve.index.pool: no readable image in {pool}; give images with .txt captions")
    return staged


def _gather(work: Path, folder: Path, pool: Path, staged: dict[str, SourceImage], result: Indexed) -> None:
    """Move the tool's output to the index folder; the paths in it become names in the pool and captions."""
    import pyarrow
    import pyarrow.parquet as parquet

    rows: list[dict[str, str]] = []
    for part in sorted((work / "embedded" / "metadata").glob("*.parquet")):
        for path in parquet.read_table(part, columns=["image_path"])["image_path"].to_pylist():
            item = staged[PurePosixPath(path).name]
            rows.append({"name": item.name, "caption": item.caption or ""})
    (folder / EMBEDDINGS).parent.mkdir()
    shutil.move(work / "embedded" / EMBEDDINGS, folder / EMBEDDINGS)
    count = len(np.load(folder / EMBEDDINGS, mmap_mode="r"))
    if count != len(rows):
        raise UserError(f"{clip_tool.NAME}: wrote {count} embeddings for {len(rows)} images")
    (folder / "rows.json").write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "metadata").mkdir()
    table = {
        "image_path": [(pool / row["name"]).as_posix() for row in rows],
        "caption": [row["caption"] for row in rows],
    }
    parquet.write_table(pyarrow.table(table), folder / "metadata" / "metadata_0.parquet")
    result.count = len(rows)


@contextmanager
def _timed(result: Indexed, step: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    result.seconds[step] = round(time.monotonic() - started, 1)


def no_index(out: Path | str, reason: str) -> None:
    """Write an index folder that only says why there is no index, because DVC needs the stage's output."""
    with files.atomic_directory(out) as folder:
        (folder / "README.txt").write_text(f"No index is needed: {reason}.\n", encoding="utf-8")


def read_rows(index: Path) -> list[dict[str, str]]:
    """Name in the pool and caption of each row of an index.

    Raises:
        UserError: there is no index.
    """
    try:
        return json.loads((index / "rows.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{index}: no index; run `dvc repro index-pool` with retrieve.backend: index") from error


@dataclass(frozen=True)
class Hit:
    """One row of the index that a query found."""

    row: int
    similarity: float  # cosine of its image embedding and the query


def query_index(
    index: Path,
    query: np.ndarray,
    *,
    duplicate_similarity: float,
    exclude: np.ndarray | None = None,
    keep: Callable[[str, float], bool] | None = None,
    first: int = 1000,
    caption_weight: float = 0.0,
    embed: Callable[[list[str]], np.ndarray] | None = None,
) -> Iterator[Hit]:
    """Rows of an index by descending cosine to a query, without near-duplicates.

    A row is skipped if its cosine to an excluded vector or to an earlier result is at least `duplicate_similarity`.

    Args:
        query: (D,) float32 of norm 1.
        exclude: (M, D) float32 of norm 1.
        keep: whether a row is a result, from its caption and its cosine to the query; None: every row is.
        first: size of the first group of nearest rows, which is ranked as a whole; later groups end at four times the
            place of the one before.
        caption_weight: w of the ranking (1 - w) * cosine to the image + w * cosine to its caption, within a group.
        embed: texts to (N, D) float32 of norm 1, for the captions; needed if `caption_weight` is above 0.

    Raises:
        UserError: there is no index, or it was built with another CLIP.
    """
    names = read_rows(index)
    embeddings = np.load(index / EMBEDDINGS, mmap_mode="r")
    if embeddings.shape[1] != len(query):
        raise UserError(
            f"retrieve.index.clip: has {len(query)} dimensions, but {index} has {embeddings.shape[1]}; "
            "run `dvc repro index-pool`"
        )
    size = 0 if exclude is None else len(exclude)
    taken = np.zeros((max(1024, 2 * size), len(query)), np.float32)  # doubled when full
    if size:
        taken[:size] = exclude
    nearest = np.argsort(-(similarities := _cosines(embeddings, query)), kind="stable")
    if keep:
        nearest = nearest[[keep(names[row]["caption"], float(similarities[row])) for row in nearest]]
    start, end = 0, first
    while start < len(nearest):
        fresh = nearest[start:end]
        start, end = end, 4 * end
        vectors = embeddings[fresh].astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        cosines = vectors @ query
        ranks = cosines
        if caption_weight and embed:
            captions = embed([names[row]["caption"] for row in fresh])
            ranks = (1 - caption_weight) * cosines + caption_weight * (captions @ query)
        for place in np.lexsort((fresh, -ranks)):  # equal cosines: order of the pool
            if size and float((taken[:size] @ vectors[place]).max()) >= duplicate_similarity:
                continue
            if size == len(taken):
                taken = np.concatenate([taken, np.zeros_like(taken)])
            taken[size] = vectors[place]
            size += 1
            yield Hit(int(fresh[place]), float(cosines[place]))


def _cosines(embeddings: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine of each row to the query, (N,) float32; reads `ROWS_AT_ONCE` rows at a time."""
    found = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), ROWS_AT_ONCE):
        part = embeddings[start : start + ROWS_AT_ONCE].astype(np.float32)
        found[start : start + ROWS_AT_ONCE] = part @ query / np.linalg.norm(part, axis=1)
    return found
