"""`customdiff export` and `customdiff import`: adapters for other programs, and from them."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff.adapters import formats
from customdiff.errors import UserError

EXPORT_EXAMPLES = f"""Formats:

\b
{formats.listed("export")}

Examples:

\b
  customdiff export --format pipeline --out exports/pipeline
  customdiff export --format kohya --rank 16 --out exports/webui
  customdiff export --format lora --adapter models/adapter --out exports/lora
"""

IMPORT_EXAMPLES = f"""Formats:

\b
{formats.listed("import")}

Examples:

\b
  customdiff import delta.bin --format delta --base CompVis/stable-diffusion-v1-4 \\
    --token '<new1>' --class-prompt cat --out models/imported --allow-pickle
  customdiff import trained --format diffusers --base CompVis/stable-diffusion-v1-4 \\
    --token '<new1>' --class-prompt cat --token '<new2>' --class-prompt 'wooden pot'

Quote the tokens: a shell takes < and > for redirections.
"""


def export(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="One of those below.")],
    adapter: Annotated[Path, typer.Option(help="Folder of what was learned.")] = Path("models/adapter"),
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or Hub name; by default the one it was learned on.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="lora and kohya: of each layer's change; by default all of it.")
    ] = None,
) -> None:
    """Write an adapter in the form that another program reads, load it again and compare."""
    written = formats.export_adapter(format, adapter, out, base=base, rank=rank)
    typer.echo(f"{out}: {written.instructions}")
    if rank is not None:
        typer.echo(f"rank {rank} leaves out {100 * written.error:.1f} % of the change, by its norm")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The other program's file or folder.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="One of those below.")],
    base: Annotated[str, typer.Option(help="Base model that it was learned on, folder or Hub name.")],
    token: Annotated[list[str], typer.Option(help="A modifier token in it; give this again for each.")],
    class_prompt: Annotated[list[str], typer.Option(help="What the token is one of; again for each token.")],
    instance_prompt: Annotated[
        list[str] | None, typer.Option(help="A caption with {} for the token; by default 'photo of a {} CLASS'.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("models/imported"),
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin and .ckpt; tensors in them, and nothing else.")
    ] = False,
) -> None:
    """Make an adapter of what another program wrote, once it is seen to fit its base model."""
    prompts = instance_prompt or [f"photo of a {{}} {name}" for name in class_prompt]
    if not len(token) == len(class_prompt) == len(prompts):
        raise UserError(
            f"--class-prompt: {len(token)} tokens need as many class prompts (and instance prompts, if any)"
        )
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--instance-prompt: {prompt!r} must hold {{}} once, where the token goes")
    concepts = [formats.ImportedConcept(*each) for each in zip(token, class_prompt, prompts, strict=True)]
    found = formats.import_adapter(format, path, out, base=base, concepts=concepts, allow_pickle=allow_pickle)
    typer.echo(
        f"{out}: an adapter of {base}, {len(found.weights)} weights and {', '.join(found.embeddings)}; to draw with it:"
    )
    typer.echo(f'  customdiff sample "{prompts[0].format(token[0])}" --adapter {out}')
