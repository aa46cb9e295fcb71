"""Adapters in the forms that other programs read, and back: the formats by name, `export_adapter`, `import_adapter`.

Light to import: torch and a format's own module are loaded when they are used. A module that exports has

    check(config, rank)                     refuses what the format cannot hold
    write(source, folder, rank) -> error    writes its files; the share of the change that a lower rank leaves out
    verify(source, folder, error)           loads them again as the other program does, and compares
    instructions(config, folder) -> str     says which program opens them, by which call

and one that imports has `read(path, request) -> foreign.ImportedWeights`.
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
    """One form that an adapter can take.

    Attributes:
        module: of this package.
        sentence: what it is, for the screen.
        ways: where it can go.
    """

    module: str
    sentence: str
    ways: tuple[Literal["export", "import"], ...] = ("export",)


FORMATS = {
    "pipeline": Format("pipeline", "a whole diffusers pipeline; DiffusionPipeline.from_pretrained loads it alone"),
    "lora": Format("lora", "a LoRA for diffusers' load_lora_weights, and each token as a textual inversion"),
    "kohya": Format("kohya", "a LoRA and embeddings for AUTOMATIC1111, Forge, ComfyUI and sd-scripts"),
    "delta": Format("delta", "delta.bin of the paper's diffusers code", ("export", "import")),
    "compvis": Format("compvis", "delta.ckpt of the paper's CompVis code", ("export", "import")),
    "diffusers": Format("reference", "the folder that diffusers' train_custom_diffusion.py writes", ("import",)),
}


class Exported(NamedTuple):
    """What `export_adapter` wrote.

    Attributes:
        instructions: which program opens it, by which call; several lines.
        error: norm of what the files leave out of the UNet's change, over the norm of the change.
    """

    instructions: str
    error: float


class ImportedConcept(NamedTuple):
    """What an imported token means, for the adapter's config; `instance_prompt` has {} where the token goes."""

    token: str
    class_prompt: str
    instance_prompt: str


def export_adapter(
    name: str, folder: Path | str, out: Path, *, base: str | None = None, rank: int | None = None
) -> Exported:
    """Write the adapter in `folder` in another program's form into a new folder, load it again and compare.

    Args:
        name: of a format.
        folder: the adapter's.
        out: folder to make; whatever is there already is left alone.
        base: base model, folder or Hub name; None: the one that the adapter names.
        rank: for `lora` and `kohya`, the most that a layer's change may have; None: all of the change.

    Raises:
        UserError: the format cannot hold this adapter, the base is another one, `out` is taken, or the written files
            do not give back what was learned.
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
    """Make an adapter in a new folder of what another program wrote, once it is seen to fit its base model.

    Args:
        name: of a format.
        path: the other program's file or folder.
        out: folder to make; whatever is there already is left alone.
        base: the base model that it was learned on, folder or Hub name.
        concepts: what each token means.
        allow_pickle: read pickles too, though nothing but tensors and plain containers in them.

    Raises:
        UserError: the file is not of this format, is a pickle and not allowed, lacks a token, or does not fit the base.
    """
    form = _module(name, "import")
    from customdiff.adapters import adapter
    from customdiff.adapters.formats import foreign
    from customdiff.config import Base
    from customdiff.models import base as base_model

    check_free(out)
    tokens = [concept.token for concept in concepts]
    if len(set(tokens)) < len(tokens):
        raise UserError(f"--token: each once (here: {', '.join(tokens)})")
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    chosen = Base(model=base)
    pipe = base_model.load_pipeline(chosen, vae=None)
    found = form.read(path, foreign.ImportRequest(tokens, pipe, allow_pickle))
    imported = foreign.adapter_from(found, pipe, chosen, concepts, name)
    adapter.inject(pipe, imported)
    with atomic_directory(out) as incoming:
        adapter.save(imported, incoming)
    return imported


def listed(way: str) -> str:
    """The formats that go one way, a line each."""
    return "\n".join(f"  {name:<11}{form.sentence}" for name, form in FORMATS.items() if way in form.ways)


def _module(name: str, way: str) -> ModuleType:
    possible = ", ".join(each for each, form in FORMATS.items() if way in form.ways)
    if name not in FORMATS:
        raise UserError(f"--format: there is no {name}; use one of {possible}")
    if way not in FORMATS[name].ways:
        raise UserError(f"--format: {name} is for {FORMATS[name].ways[0]} alone; {way} takes one of {possible}")
    return importlib.import_module(f"customdiff.adapters.formats.{FORMATS[name].module}")
