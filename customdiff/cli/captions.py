"""`customdiff captions`: show the captions of photos, or write them beside the photos to edit."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff import config

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
    from customdiff.new_concept import photo_files

    for name in names or params.concepts:
        concept = config.concept(params, name)
        folder = photo_files.source_folder(name, concept) if write else None
        typer.echo(f"{name}:")
        for photo, caption in photo_files.captions_of(params, name, ignore_sidecars=write and force).items():
            typer.echo(f"  {photo}: {caption.text}  ({'; '.join((caption.origin, *caption.warnings))})")
            if folder and caption.origin != "sidecar":
                typer.echo(f"    wrote {photo_files.write_caption(folder / photo, caption.text, concept)}")
