"""`customdiff merge` and `customdiff compress`: make adapters from adapters without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from customdiff.errors import UserError
from customdiff.files import atomic_directory, check_free

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from customdiff.adapters.config import AdapterConfig

MERGE_EXAMPLES = """Examples:

\b
  customdiff merge models/cat models/teapot --out models/both
  customdiff merge models/cat models/teapot models/bell --captions captions.txt --out models/three
  customdiff sample "<new1> cat next to a <new2> teapot" --adapter models/both

The adapters must have the same base model and different tokens. By default captions are read from data/classes,
data/former/classes and data/pool; captions that name a class help most. With --fidelity 0 the objective is the paper's.
If one subject is less faithful than the other, increase the fidelity of its adapter: --fidelity 10 --fidelity 30.
"""

COMPRESS_EXAMPLES = """Examples:

\b
  customdiff compress --energy 0.6 --out models/small           as the paper does
  customdiff compress --rank 4 --half --out models/small
  customdiff compress models/both --size-mb 1 --out models/small

All customdiff commands read compressed adapters. Use `customdiff export` for other programs.
"""
CAPTIONS = [Path("data/classes"), Path("data/former/classes"), Path("data/pool")]


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders of adapters.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged adapter.")],
    captions: Annotated[
        list[Path] | None,
        typer.Option(help="Text file with one caption per line, or folder of captions; repeatable."),
    ] = None,
    num_captions: Annotated[int, typer.Option(min=1, help="Maximum number of captions per source.")] = 1000,
    fidelity: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="Weight of an adapter's captions relative to the others; one for all adapters or one for each "
            "(default: 10).",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model (default: that of the first adapter).")
    ] = None,
) -> None:
    """Merge adapters into one that has all of their concepts."""
    check_free(out)
    if len(set(adapters)) < max(2, len(adapters)):
        raise UserError(f"ADAPTER: give at least two different adapters (here: {', '.join(map(str, adapters))})")
    from customdiff.adapters import adapter, merging

    fidelities = fidelity or [merging.FIDELITY]
    if len(fidelities) not in (1, len(adapters)):
        raise UserError(f"--fidelity: {len(fidelities)} values for {len(adapters)} adapters; give one, or one for each")
    fidelities *= len(adapters) // len(fidelities)
    parts = {str(path): adapter.read(path) for path in adapters}
    merging.check(parts)
    sources = captions or [path for path in CAPTIONS if merging.has_captions(path)]
    if not sources:
        raise UserError(
            "--captions: neither data/classes nor data/pool has captions; give a text file with one caption per line"
        )
    texts = list(dict.fromkeys(text for path in sources for text in merging.read_captions(path, num_captions)))
    merged = merging.merge(pipeline(parts[str(adapters[0])].config, base, "auto"), parts, texts, fidelities)
    with atomic_directory(out) as folder:
        adapter.save(merged.adapter, folder)
    typer.echo(
        f"{out}: {', '.join(merged.adapter.embeddings)}; {len(texts)} captions, {merged.targets} target states of rank "
        f"{merged.rank}, residual {merged.residual:.0e}"
    )
    for concept in merged.adapter.config.concepts.values():
        if not merging.naming_class(concept, texts):
            typer.echo(
                f"note: no caption contains {concept.class_prompt!r}; captions with it make "
                f"{concept.modifier_token} more faithful",
                err=True,
            )


def compress(
    out: Annotated[Path, typer.Option(help="New folder for the compressed adapter.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")] = Path("models/adapter"),
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of each change's sum of singular values to keep (default: 0.6)."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Number of singular values of each change to keep.")] = None,
    size_mb: Annotated[
        float | None,
        typer.Option(min=0, help="Maximum size of the weights file in MB, distributed for the smallest error."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store factors in half precision.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub name of the base model (default: that of the adapter).")
    ] = None,
) -> None:
    """Compress an adapter by keeping the largest singular values of its weight changes."""
    check_free(out)
    chosen = {"--energy": energy, "--rank": rank, "--size-mb": size_mb}
    given = [name for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give only one of them")
    if not given:
        energy = 0.6
    import torch

    from customdiff.adapters import adapter as adapters
    from customdiff.adapters import compression

    learned = adapters.read(adapter)
    compression.check(learned)
    pipe = pipeline(learned.config, base, "cpu")
    small = compression.compress(
        pipe,
        learned,
        energy=energy,
        rank=rank,
        size=None if size_mb is None else int(size_mb * 1e6),
        dtype=torch.float16 if half else torch.float32,
    )
    error = compression.relative_error(pipe, learned, small)
    with atomic_directory(out) as folder:
        adapters.save(small, folder, with_pickle=False)
    before, after = (adapters.size(folder) for folder in (adapter, out))
    ranks = [weight.shape[0] for name, weight in small.weights.items() if name.endswith(".down")]
    typer.echo(
        f"{out}: {before / 1e3:.0f} kB -> {after / 1e3:.0f} kB ({100 * after / before:.1f} %), "
        f"ranks {min(ranks)} to {max(ranks)}; relative error of the change {100 * error:.1f} %"
    )


def pipeline(adapter_config: "AdapterConfig", base: str | None, device: str) -> "DiffusionPipeline":
    """Load the base model of an adapter, or the one that replaces it, without its VAE."""
    from customdiff.models import base as base_model

    chosen = adapter_config.base_model(base)
    return base_model.load_pipeline(chosen, device=base_model.device(device), vae=None)
