"""Export and import of adapters in other programs' formats.

torch and the module of a format are imported on first use, so that the command line starts fast. A format with export
has the functions

    check(config, rank)                     raises an error if the format cannot hold the adapter
    write(source, folder, rank) -> error    writes the files; returns the relative error of the change
    verify(source, folder, error)           loads the files as the other program does and compares weights
    instructions(config, folder) -> str     how to open the files

and a format with import has `read(path, request) -> foreign.ImportedWeights`.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

from customdiff.errors import UserError
from customdiff.files import atomic_directory, check_free

if TYPE_CHECKING:
    from customdiff.adapters.adapter import Adapter


@dataclass(frozen=True)
class Format:
    """A file format of another program.

    Attributes:
        module: module of this package that implements it.
        description: one line for help texts.
        directions: supported conversions.
    """

    module: str
    description: str
    directions: tuple[Literal["export", "import"], ...] = ("export",)


FORMATS = {
    "pipeline": Format("pipeline", "a complete diffusers pipeline for DiffusionPipeline.from_pretrained"),
    "lora": Format("lora", "a LoRA for diffusers' load_lora_weights, and a textual inversion per token"),
    "kohya": Format("kohya", "a LoRA and embeddings for AUTOMATIC1111, Forge, ComfyUI and sd-scripts"),
    "delta": Format("delta", "delta.bin of the paper's diffusers code", ("export", "import")),
    "compvis": Format("compvis", "delta.ckpt of the paper's CompVis code", ("export", "import")),
    "diffusers": Format("reference", "the folder that diffusers' train_custom_diffusion.py writes", ("import",)),
}


class Exported(NamedTuple):
    """Result of `export_adapter`.

    Attributes:
        instructions: how to open the files; several lines.
        error: norm of the error of the UNet's change over the norm of the change.
    """

    instructions: str
    error: float


class ImportedConcept(NamedTuple):
    """Concept of an imported token; `instance_prompt` has {} where the token goes."""

    token: str
    class_prompt: str
    instance_prompt: str


def export_adapter(
    name: str, folder: Path | str, out: Path, *, base: str | None = None, rank: int | None = None
) -> Exported:
    """Export the adapter in `folder` to another program's format, and check that the files reproduce it.

    Args:
        name: name of the format.
        folder: folder of the adapter.
        out: new folder; an existing one is not changed.
        base: folder or Hub name of the base model; None: that of the adapter.
        rank: maximum rank of a layer's change, for `lora` and `kohya`; None: no limit.

    Raises:
        UserError: the format cannot hold the adapter, the base model is another one, `out` exists, or the files do not
            reproduce the adapter.
    """
    form = _module(name, "export")
    from customdiff.adapters import adapter
    from customdiff.adapters.formats.changes import source_of
    from customdiff.models import base as base_model

    learned = adapter.read(folder)
    form.check(learned.config, rank)
    check_free(out)
    pipe = base_model.load_pipeline(learned.config.base_model(base))
    adapter.check_base(pipe, learned)
    source = source_of(learned, pipe)
    with atomic_directory(out) as incoming:
        error = form.write(source, incoming, rank)
        form.verify(source, incoming, error)
    return Exported(form.instructions(source.adapter.config, out), error)


def import_adapter(
    name: str, path: Path, out: Path, *, base: str, concepts: list[ImportedConcept], allow_pickle: bool = False
) -> "Adapter":
    """Import an adapter of another program into a new folder, after checking that it fits its base model.

    Args:
        name: name of the format.
        path: file or folder to import.
        out: new folder; an existing one is not changed.
        base: folder or Hub name of the base model.
        concepts: concept of each token.
        allow_pickle: read pickled files, restricted to tensors and plain containers.

    Raises:
        UserError: the file has another format, is a pickle that is not allowed, lacks a token, or does not fit `base`.
    """
    form = _module(name, "import")
    from customdiff.adapters import adapter
    from customdiff.adapters.formats import foreign
    from customdiff.config import Base
    from customdiff.models import base as base_model

    check_free(out)
    tokens = [concept.token for concept in concepts]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"--token: give each token once (here: {', '.join(tokens)})")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    chosen = Base(model=base)
    pipe = base_model.load_pipeline(chosen, vae=None)
    weights = form.read(path, foreign.ImportRequest(tokens, pipe, allow_pickle))
    imported = foreign.adapter_from(weights, pipe, chosen, concepts, name)
    adapter.inject(pipe, imported)
    with atomic_directory(out) as incoming:
        adapter.save(imported, incoming)
    return imported


def format_list(direction: str) -> str:
    """The formats of one direction with their descriptions, one per line."""
    return "\n".join(
        f"  {name:<11}{form.description}" for name, form in FORMATS.items() if direction in form.directions
    )


def _module(name: str, direction: str) -> ModuleType:
    valid = ", ".join(known for known, form in FORMATS.items() if direction in form.directions)
    if name not in FORMATS:
        raise UserError(f"--format: unknown format {name}; use one of {valid}")
    if direction not in FORMATS[name].directions:
        raise UserError(f"--format: {name} does not support {direction}; use one of {valid}")
    return importlib.import_module(f"customdiff.adapters.formats.{FORMATS[name].module}")
