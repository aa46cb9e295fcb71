"""Serve an index of a pool with `clip-retrieval back`, on this machine only unless told otherwise.

clip-retrieval reads images from paths, so those of tars are extracted. It listens on all interfaces; a hook that Python
loads at its start replaces that address.
"""

import json
import os
from pathlib import Path

from customdiff import files
from customdiff.errors import UserError
from customdiff.retrieval import clip_index, clip_tool

HOST_VARIABLE = "CUSTOMDIFF_SERVE_HOST"
MARKER = "indices.json"  # a folder with it holds the files of a service
HOOK = f"""\
import os

import flask

run = flask.Flask.run
flask.Flask.run = lambda self, host=None, **options: run(self, host=os.environ["{HOST_VARIABLE}"], **options)
"""


def build(index: Path, pool: Path, clip: str, out: Path, name: str) -> list[str]:
    """Write what the service reads, a faiss index, metadata and images, and return its arguments.

    Args:
        index: folder that `clip_index.build_index` wrote.
        pool: the pool of the index.
        clip: `retrieve.index.clip`.
        out: folder to write, which is replaced.
        name: of the index in requests.

    Raises:
        UserError: there is no index, the pool has changed since, or clip-retrieval is missing or fails.
    """
    rows = clip_index.read_rows(index)
    with files.atomic_directory(out) as folder:
        embeddings = ["index", f"--embeddings_folder={index.resolve()}", "--index_folder=index"]
        clip_tool.run(clip_tool.command(), [*embeddings, "--copy_metadata=False"], folder)
        paths = _paths(pool, [row["name"] for row in rows], folder / "images")
        _write_metadata(folder / "index/metadata", [out.resolve() / path for path in paths], rows)
        model = clip_tool.model_argument(clip, folder / "clip")
        (folder / MARKER).write_text(json.dumps({name: "index"}), encoding="utf-8")
        (folder / "hook").mkdir()
        (folder / "hook/sitecustomize.py").write_text(HOOK, encoding="utf-8")
    options = ("use_jit", "enable_mclip_option", "provide_aesthetic_embeddings")
    return ["back", f"--indices_paths={MARKER}", f"--clip_model={model}", *(f"--{each}=False" for each in options)]


def serve(arguments: list[str], folder: Path, host: str, port: int) -> None:
    """Replace this process by the service.

    Args:
        arguments: that `build` returned.
        folder: that `build` wrote.
        host: address to listen on.
    """
    command = clip_tool.command()
    env = os.environ | {HOST_VARIABLE: host, "PYTHONPATH": str((folder / "hook").resolve())}
    os.chdir(folder)
    os.execvpe(command[0], [*command, *arguments, f"--port={port}"], env)


def _paths(pool: Path, names: list[str], extracted: Path) -> list[Path]:
    """Where the images of a pool lie: absolute paths of files, and paths below the output folder of extracted ones."""
    inside_tars = {name for name in names if not (pool / name).is_file()}
    found: dict[str, Path] = {}
    extracted.mkdir()
    for number, item in enumerate(clip_index.pool_images(pool, inside_tars) if inside_tars else ()):
        path = extracted / f"{number:08}{Path(item.name).suffix.lower()}"
        path.write_bytes(item.data)
        found[item.name] = Path("images", path.name)
    missing = inside_tars - found.keys()
    if missing:
        raise UserError(f"retrieve.index.pool: {min(missing)} is no longer in {pool}; run `dvc repro index-pool`")
    return [found.get(name, (pool / name).resolve()) for name in names]


def _write_metadata(folder: Path, paths: list[Path], rows: list[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    table = {"image_path": [str(path) for path in paths], "caption": [row["caption"] for row in rows]}
    parquet.write_table(pyarrow.table(table), folder / "metadata_0.parquet")
