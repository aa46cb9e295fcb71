"""A pool of captioned images, the index of their embeddings that clip-retrieval writes, and queries of it.

clip-retrieval is not imported: it holds back numpy and transformers, so it lives in an environment of its own and is
driven by its command line. A query compares all embeddings, exactly: a pipeline asks once a concept, and a million of
them are compared sooner than an approximate index of them is built.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from customdiff import files, images
from customdiff.errors import UserError
from customdiff.sources import image_folder
from customdiff.sources.image_folder import Refused, SourceImage

TOOL = "clip-retrieval"
TOOL_FOLDER = ".venv-clip-retrieval"
TOOL_VARIABLE = "CUSTOMDIFF_CLIP_RETRIEVAL"
MAX_IMAGE_BYTES = 32_000_000
EMBEDDINGS = "img_emb/img_emb_0.npy"  # clip-retrieval's own name
ROWS_AT_ONCE = 16_384
OPENAI_NAMES = {  # names that clip-retrieval knows, and the same models as Hub repositories
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


def pool_images(pool: Path, wanted: set[str] | None = None) -> Iterator[SourceImage]:
    """The images of a pool in a fixed order, each with its caption and a name that is the same on every machine.

    Args:
        pool: a folder of images with `.txt` captions beside them, of tars of such pairs (webdataset), or one such tar.
        wanted: only images of these names.

    Raises:
        UserError: there is no such pool.
    """
    if pool.is_file():
        yield from _tar_images(pool, pool.name, wanted)
        return
    if not pool.is_dir():
        raise UserError(
            f"retrieve.index.pool: {pool} does not exist; give a folder of images with .txt captions, "
            "of webdataset tars, or one tar"
        )
    names = image_folder.walk(pool)
    loose = [name for name in names if image_folder.is_image(name) and (wanted is None or name in wanted)]
    yield from image_folder.folder_images(pool, loose, max_megabytes=MAX_IMAGE_BYTES / 1e6)
    for name in names:
        if name.lower().endswith((".tar", ".tar.gz", ".tgz")):
            yield from _tar_images(pool / name, name, wanted)


def _tar_images(tar: Path, label: str, wanted: set[str] | None) -> Iterator[SourceImage]:
    """Images of a webdataset tar: files of one sample share their name up to its first dot."""
    if wanted is not None and not any(name.startswith(f"{label}/") for name in wanted):
        return
    try:
        with tarfile.open(tar) as opened:
            members = [member for member in opened if member.isreg() and not member.issparse()]
            captions = {_sample(member.name): member for member in members if member.name.lower().endswith(".txt")}
            for member in members:
                name = f"{label}/{member.name.removeprefix('./')}"
                if not image_folder.is_image(member.name) or (wanted is not None and name not in wanted):
                    continue
                if member.size > MAX_IMAGE_BYTES:
                    yield SourceImage(name, b"", problem=f"above {MAX_IMAGE_BYTES / 1e6:g} MB")
                    continue
                caption = captions.get(_sample(member.name))
                text = opened.extractfile(caption).read(image_folder.MAX_CAPTION_BYTES) if caption else b""
                yield SourceImage(name, opened.extractfile(member).read(), image_folder.one_line(text))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"retrieve.index.pool: {tar} cannot be read ({images.brief(error)})") from error


def _sample(name: str) -> str:
    path = PurePosixPath(name)
    return f"{path.parent}/{path.name.partition('.')[0]}"


@dataclass
class Indexed:
    """What `build_index` wrote: how many images, what was set aside, and seconds by step."""

    count: int = 0
    set_aside: list[Refused] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def build_index(pool: Path | str, clip: str, out: Path | str, *, max_megapixels: float = 64) -> Indexed:
    """Embed a pool, by `clip-retrieval inference` in its own environment.

    Writes `img_emb/img_emb_0.npy` ((N, D) float16, unit norm), `rows.json` (name in the pool and caption of each row)
    and `metadata/metadata_0.parquet`, which `clip-retrieval index` takes as they are where the pool is to be served.

    Args:
        pool: see `pool_images`.
        clip: a CLIP folder, a Hub repository, or one of OpenAI's names such as ViT-B/32.

    Raises:
        UserError: the pool, the CLIP or clip-retrieval is missing or fails.
    """
    pool, out, result = Path(pool), Path(out), Indexed()
    command = tool()
    with tempfile.TemporaryDirectory(prefix="customdiff-index-") as name, files.atomic_directory(out) as folder:
        work = Path(name)
        with _timed(result, "prepare images"):
            staged = _stage(pool, work / "images", max_megapixels, result)
        model = _tool_clip(clip, work / "clip")
        with _timed(result, "clip-retrieval inference"):
            # The worker is what `clip-retrieval inference` starts; alone it spares a process that only draws a bar.
            embed = ["inference.worker", "--tasks=[0]", "--output_partition_count=1", "--num_prepro_workers=0"]
            embed += ["--input_dataset=images", "--input_format=files", "--output_folder=embedded"]
            embed += [f"--clip_model={model}", "--enable_text=False", "--use_jit=False"]
            embed += [f"--batch_size={min(32, len(staged))}"]
            run_tool(command, embed, work)
        _gather(work, folder, pool, staged, result)
    return result


def _stage(pool: Path, folder: Path, max_megapixels: float, result: Indexed) -> dict[str, SourceImage]:
    """Write the pool's good images, as they will be used, under numbers; returns them by file name."""
    folder.mkdir()
    staged = {}
    for item in tqdm(pool_images(pool), desc="pool", unit="image", disable=None):
        try:
            image = image_folder.decode(item, max_megapixels)
        except images.ImageError as error:
            result.set_aside.append(Refused(item.name, error.reason))
            continue
        path = images.save(image, folder / f"{len(staged):08}", source=item.data)
        staged[path.name] = SourceImage(item.name, b"", item.caption)
    if not staged:
        raise UserError(f"retrieve.index.pool: no good image lies in {pool}; give images with .txt captions")
    return staged


def _gather(work: Path, folder: Path, pool: Path, staged: dict[str, SourceImage], result: Indexed) -> None:
    """Put the tool's outputs into the index folder, with names and captions for the paths it knew."""
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
        raise UserError(f"{TOOL}: wrote {count} embeddings for {len(rows)} images")
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


def no_index(out: Path | str, backend: str) -> None:
    """Write an index folder that says why there is no index, so that DVC has the stage's output."""
    with files.atomic_directory(out) as folder:
        (folder / "README.txt").write_text(f"retrieve.backend is {backend}, which needs no index.\n", encoding="utf-8")


def tool(root: Path | str = ".") -> list[str]:
    """The command that runs clip-retrieval.

    The environment variable CUSTOMDIFF_CLIP_RETRIEVAL goes first, then `.venv-clip-retrieval` in the project, then
    the PATH.

    Raises:
        UserError: it is not installed; the message has the commands that install it.
    """
    if named := os.environ.get(TOOL_VARIABLE):
        command = [named] if Path(named).is_file() else shlex.split(named)
        if not shutil.which(command[0]):
            raise UserError(f"{TOOL_VARIABLE}: {named} cannot be run; name clip-retrieval's executable, or unset it")
        return [str(Path(command[0]).resolve()) if Path(command[0]).is_file() else command[0], *command[1:]]
    for project in (Path(root), Path(__file__).parents[2]):
        for path in ("bin/clip-retrieval", "Scripts/clip-retrieval.exe"):
            if (project / TOOL_FOLDER / path).is_file():
                return [str((project / TOOL_FOLDER / path).absolute())]
    if found := shutil.which(TOOL):
        return [found]
    raise UserError(
        f"retrieve.backend: index needs {TOOL}, which is not installed; run: uv venv {TOOL_FOLDER} && "
        f"uv pip install --python {TOOL_FOLDER} -r requirements/clip-retrieval.txt"
    )


def run_tool(command: list[str], arguments: list[str], folder: Path) -> None:
    """Run clip-retrieval in a folder; its own chatter is shown only if it fails.

    Args:
        command: as `tool` gives it.
        arguments: its subcommand and options.

    Raises:
        UserError: it cannot be run, or ended with an error.
    """
    env = os.environ | {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    # Its imports take 30 s where Python may not keep compiled files, and 12 s where it may.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    for ours in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # our environment's packages must not reach into its own
        env.pop(ours, None)
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be run ({error.strerror or error})") from error
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        print("\n".join(lines[-20:]), file=sys.stderr)
        raise UserError(
            f"`{TOOL} {arguments[0]}` failed (exit status {done.returncode}): "
            f"{lines[-1][:200] if lines else 'no output'}"
        )


def _tool_clip(clip: str, folder: Path) -> str:
    """What `--clip_model` is given for a CLIP.

    clip-retrieval warms every model up with texts of 77 tokens from OpenAI's vocabulary of 49408. A CLIP with a smaller
    text model would crash there, although only its image side is asked for: such a one is handed over as a copy with
    the same image side and a text model of no layers.
    """
    clip = OPENAI_NAMES.get(clip, clip)
    path = Path(clip)
    if not path.is_dir():
        return f"hf_clip:{clip}"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        text = config["text_config"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"retrieve.index.clip: {clip} holds no CLIP (config.json with text_config)") from error
    if text.get("vocab_size", 49408) >= 49408 and text.get("max_position_embeddings", 77) >= 77:
        return f"hf_clip:{path.resolve()}"
    _write_image_side(path, config, folder)
    return f"hf_clip:{folder.name}"


def _write_image_side(path: Path, config: dict[str, Any], folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    width, tokens, positions = 8, 49408, 77
    weights = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith("text_")}
    weights |= {
        "text_model.embeddings.token_embedding.weight": np.zeros((tokens, width), np.float32),
        "text_model.embeddings.position_embedding.weight": np.zeros((positions, width), np.float32),
        "text_model.final_layer_norm.weight": np.ones(width, np.float32),
        "text_model.final_layer_norm.bias": np.zeros(width, np.float32),
        "text_projection.weight": np.zeros((config["projection_dim"], width), np.float32),
    }
    text = {"vocab_size": tokens, "max_position_embeddings": positions, "hidden_size": width}
    text |= {"intermediate_size": width, "num_hidden_layers": 0, "num_attention_heads": 1}
    processor = path / "preprocessor_config.json"
    pixels = json.loads(processor.read_text()) if processor.is_file() else _nested_processor(path)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(pixels | {"image_processor_type": "CLIPImageProcessor"})
    )
    (folder / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _nested_processor(path: Path) -> dict[str, Any]:
    """The image processor's settings where a whole CLIPProcessor was saved by transformers 5."""
    try:
        return json.loads((path / "processor_config.json").read_text())["image_processor"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"retrieve.index.clip: {path} has no preprocessor_config.json") from error


def read_rows(index: Path) -> list[dict[str, str]]:
    """Name in the pool and caption of each row of an index.

    Raises:
        UserError: there is no index.
    """
    try:
        return json.loads((index / "rows.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{index}: holds no index; run `dvc repro index-pool` with retrieve.backend: index") from error


@dataclass(frozen=True)
class Hit:
    """One row of the index that answers a query."""

    row: int
    similarity: float  # cosine of its image to the query


def query_index(
    index: Path,
    query: np.ndarray,
    *,
    duplicate_similarity: float,
    exclude: np.ndarray | None = None,
    first: int = 1000,
    caption_weight: float = 0.0,
    embed: Callable[[list[str]], np.ndarray] | None = None,
) -> Iterator[Hit]:
    """Rows of an index by falling cosine to a query, without near-duplicates.

    A row whose cosine to an excluded vector, or to a row given before, is `duplicate_similarity` or more is left out.

    Args:
        query: (D,) float32 of norm 1.
        exclude: (M, D) float32 of norm 1.
        first: rows that are looked at together, the nearest ones; then the next ones, up to four times as many, ...
        caption_weight: w of the ranking (1 - w) * cosine to the image + w * cosine to its caption, among these.
        embed: texts to (N, D) float32 of norm 1, the captions' side of that; needed where the weight is above 0.

    Raises:
        UserError: there is no index, or another CLIP made it.
    """
    names = read_rows(index)
    embeddings = np.load(index / EMBEDDINGS, mmap_mode="r")
    if embeddings.shape[1] != len(query):
        raise UserError(
            f"retrieve.index.clip: embeds in {len(query)} dimensions, {index} was made with {embeddings.shape[1]}; "
            "run `dvc repro index-pool`"
        )
    size = 0 if exclude is None else len(exclude)
    taken = np.zeros((max(1024, 2 * size), len(query)), np.float32)  # doubled when full, not copied at every hit
    if size:
        taken[:size] = exclude
    nearest = np.argsort(-_cosines(embeddings, query), kind="stable")
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
        for place in np.lexsort((fresh, -ranks)):  # equal cosines in the order of the pool
            if size and float((taken[:size] @ vectors[place]).max()) >= duplicate_similarity:
                continue
            if size == len(taken):
                taken = np.concatenate([taken, np.zeros_like(taken)])
            taken[size] = vectors[place]
            size += 1
            yield Hit(int(fresh[place]), float(cosines[place]))


def _cosines(embeddings: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(N,) float32: of each row, read from its file a part at a time, to the query."""
    found = np.empty(len(embeddings), np.float32)
    for start in range(0, len(embeddings), ROWS_AT_ONCE):
        part = embeddings[start : start + ROWS_AT_ONCE].astype(np.float32)
        found[start : start + ROWS_AT_ONCE] = part @ query / np.linalg.norm(part, axis=1)
    return found
