"""`customdiff export` and `customdiff import`: conversion of adapters to and from other programs' formats."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff.adapters import formats
from customdiff.errors import UserError

EXPORT_EXAMPLES = f"""Formats:

\b
{formats.format_list("export")}

Examples:

\b
  customdiff export --format pipeline --out exports/pipeline
  customdiff export --format kohya --rank 16 --out exports/webui
  customdiff export --format lora --adapter models/adapter --out exports/lora
"""

IMPORT_EXAMPLES = f"""Formats:

\b
{formats.format_list("import")}

Examples:

\b
  customdiff import delta.bin --format delta --base CompVis/stable-diffusion-v1-4 \\
    --token '<new1>' --class-prompt cat --out models/imported --allow-pickle
  customdiff import trained --format diffusers --base CompVis/stable-diffusion-v1-4 \\
    --token '<new1>' --class-prompt cat --token '<new2>' --class-prompt 'wooden pot'

Quote tokens, because shells interpret < and > as redirections.
"""


def export(
    out: Annotated[Path, typer.Option(help="New folder for the exported files.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="Name of the format; see below.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("models/adapter"),
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model (default: that of the adapter).")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum rank of each layer's change, for lora and kohya (default: no limit)."),
    ] = None,
) -> None:
    """Export an adapter to another program's format, and check that the files reproduce it."""
    written = formats.export_adapter(format, adapter, out, base=base, rank=rank)
    typer.echo(f"{out}: {written.instructions}")
    if rank is not None:
        typer.echo(f"relative error of the change at rank {rank}: {100 * written.error:.1f} %")


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder to import.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="Name of the format; see below.")],
    base: Annotated[str, typer.Option(help="Folder or Hub name of the base model.")],
    token: Annotated[list[str], typer.Option(help="Modifier token; repeat for each token.")],
    class_prompt: Annotated[list[str], typer.Option(help="Class of the token's subject; repeat for each token.")],
    instance_prompt: Annotated[
        list[str] | None, typer.Option(help="Caption with {} for the token (default: 'photo of a {} CLASS').")
    ] = None,
    out: Annotated[Path, typer.Option(help="New folder for the adapter.")] = Path("models/imported"),
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled files (.bin, .ckpt), restricted to tensors.")
    ] = False,
) -> None:
    """Import an adapter of another program, after checking that it fits its base model."""
    prompts = instance_prompt or [f"photo of a {{}} {name}" for name in class_prompt]
    if not len(token) == len(class_prompt) == len(prompts):
        raise UserError(
            f"--class-prompt: {len(token)} tokens need as many class prompts (and instance prompts, if any)"
        )
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise UserError(f"--instance-prompt: {prompt!r} must contain {{}} once, where the token goes")
    concepts = [formats.ImportedConcept(*values) for values in zip(token, class_prompt, prompts, strict=True)]
    imported = formats.import_adapter(format, path, out, base=base, concepts=concepts, allow_pickle=allow_pickle)
    typer.echo(
        f"{out}: adapter of {base} with {len(imported.weights)} weights and {', '.join(imported.embeddings)}; use it by"
    )
    typer.echo(f'  customdiff sample "{prompts[0].replace("{}", token[0])}" --adapter {out}')
