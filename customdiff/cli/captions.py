"""`customdiff captions`: show the captions of photos, or write them beside the photos to edit."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.config import Concept, Params
from customdiff.errors import UserError
from customdiff.files import atomic_file

EXAMPLES = """Examples:

\b
  customdiff captions                 captions of the photos of all concepts, and where they come from
  customdiff captions rex             only those of concept rex
  customdiff captions rex --write     write photo.txt beside each photo that has none; edit it, then run `dvc repro`
"""


def captions(
    names: Annotated[list[str] | None, typer.Argument(metavar="CONCEPT...", help="Concepts (default: all).")] = None,
    write: Annotated[bool, typer.Option("--write", help="Write a .txt file beside each photo that has none.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --write: replace existing .txt files.")] = False,
    file: Annotated[Path, typer.Option("--params", help="Params file.")] = Path("params.yaml"),
) -> None:
    """Show the caption of each photo as the stage `prepare` will use it.

    Captions come from the .txt file beside a photo, else from the captioner (prepare.captioner), else from
    instance_prompt; prepare.captions decides. {} in a .txt file stands for the modifier token.
    """
    params = config.load(file)
    for name in names or params.concepts:
        concept = config.concept(params, name)
        folder = _writable_source(name, concept) if write else None
        typer.echo(f"{name}:")
        for photo, caption in captions_of(params, name, ignore_sidecars=write and force).items():
            typer.echo(f"  {photo}: {caption.text}  ({'; '.join((caption.origin, *caption.warnings))})")
            if folder and caption.origin != "sidecar":
                sidecar = (folder / photo).with_suffix(".txt")
                with atomic_file(sidecar) as incoming:
                    incoming.write_text(caption.text.replace(concept.modifier_token, "{}") + "\n", encoding="utf-8")
                typer.echo(f"    wrote {sidecar}")


def captions_of(params: Params, name: str, *, ignore_sidecars: bool = False):
    """The caption of each of a concept's photos, by the photo's name in its source.

    Args:
        ignore_sidecars: caption the photos that have a .txt file as well.

    Raises:
        UserError: the source cannot be read, a caption file is wrong, or the captioner cannot be loaded.
    """
    from customdiff.models import base
    from customdiff.preparation.captions import instance_captions
    from customdiff.sources import instance_images

    concept = params.concepts[name]
    with tempfile.TemporaryDirectory(prefix="customdiff-") as work:
        folder = Path(work, name)
        collected = instance_images.collect(name, concept.source, params.download, folder)
        paths = [folder / entry["file"] for entry in collected.kept]
        if ignore_sidecars:
            for path in paths:
                path.with_suffix(".txt").unlink(missing_ok=True)
        device, tokenizer = base.device(params.base.device), base.load_tokenizer(params.base)
        found = instance_captions(paths, concept, params.prepare, device, tokenizer)
        return {entry["source"]: caption for entry, caption in zip(collected.kept, found, strict=True)}


def _writable_source(name: str, concept: Concept) -> Path:
    source = concept.source
    if not source.path or not Path(source.path).is_dir():
        raise UserError(f"concepts.{name}.source: must be a folder of photos to write captions beside them")
    return Path(source.path, source.subfolder or "")
