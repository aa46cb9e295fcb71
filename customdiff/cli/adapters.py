"""`customdiff merge` and `customdiff compress`: adapters made of adapters, without training."""

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

The adapters were learned apart, on one base model, each under a token of its own. By default captions are read from
data/classes and data/pool: those that name a class help most. With --fidelity 0 the objective is the paper's. Where
one subject comes out weaker than the other, give its adapter more: --fidelity 10 --fidelity 30.
"""

COMPRESS_EXAMPLES = """Examples:

\b
  customdiff compress --energy 0.6 --out models/small           as the paper does
  customdiff compress --rank 4 --half --out models/small
  customdiff compress models/both --size-mb 1 --out models/small

What is written loads as any adapter does here; other programs take it after `customdiff export`.
"""
CAPTIONS = [Path("data/classes"), Path("data/pool")]


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders of what was learned.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    captions: Annotated[
        list[Path] | None,
        typer.Option(help="Text file with a caption a line, or folder of captions; again for more than one."),
    ] = None,
    num_captions: Annotated[int, typer.Option(min=1, help="Drawn at random from each, where it has more.")] = 1000,
    fidelity: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="To the adapters: what their captions count beside the base's. One for all, or one for each. "
            "By default 10.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or Hub name; by default the first adapter's.")
    ] = None,
) -> None:
    """Merge adapters that were learned apart into one that knows all of their concepts."""
    check_free(out)
    if len(set(adapters)) < max(2, len(adapters)):
        raise UserError(f"merge: name two adapters or more, each once (here: {', '.join(map(str, adapters))})")
    from customdiff.adapters import adapter, merging

    fidelities = fidelity or [merging.FIDELITY]
    if len(fidelities) not in (1, len(adapters)):
        raise UserError(f"--fidelity: {len(fidelities)} given for {len(adapters)} adapters; give one, or one for each")
    fidelities *= len(adapters) // len(fidelities)
    parts = {str(path): adapter.read(path) for path in adapters}
    merging.check(parts)
    sources = captions or [path for path in CAPTIONS if path.exists()]
    if not sources:
        raise UserError(
            "--captions: neither data/classes nor data/pool is here; name a text file with a caption a line"
        )
    texts = list(dict.fromkeys(text for path in sources for text in merging.read_captions(path, num_captions)))
    merged = merging.merge(pipeline(parts[str(adapters[0])].config, base, "auto"), parts, texts, fidelities)
    with atomic_directory(out) as folder:
        adapter.save(merged.adapter, folder)
    held = f"{merged.targets} states of target words, {merged.rank} of them independent, held to {merged.residual:.0e}"
    typer.echo(f"{out}: {', '.join(merged.adapter.embeddings)} by {len(texts)} captions; {held}")
    for concept in merged.adapter.config.concepts.values():
        if not merging.naming(concept, texts):
            typer.echo(
                f"note: no caption names a {concept.class_prompt}; some that do would let "
                f"{concept.modifier_token} keep more of what it is",
                err=True,
            )


def compress(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of what was learned.")] = Path(
        "models/adapter"
    ),
    energy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of each change's sum of singular values to keep. By default 0.6."),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Singular values of each change to keep.")] = None,
    size_mb: Annotated[
        float | None, typer.Option(min=0, help="Of the file of weights, spent where it gains most.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store 16 bits a number: half the bytes.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model, folder or Hub name; by default the one it was learned on.")
    ] = None,
) -> None:
    """Make an adapter small: of what it changes, keep the largest singular values."""
    check_free(out)
    chosen = {"--energy": energy, "--rank": rank, "--size-mb": size_mb}
    given = [name for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: give one of them")
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
    typer.echo(
        f"{out}: {before / 1e3:.0f} kB -> {after / 1e3:.0f} kB ({100 * after / before:.1f} %), "
        f"ranks {min(ranks := small.config.compressed.ranks)} to {max(ranks)}; "
        f"{100 * error:.1f} % of the change is left out, by its norm"
    )


def pipeline(adapter_config: "AdapterConfig", base: str | None, device: str) -> "DiffusionPipeline":
    """The base model that an adapter was learned on, or the one named in its place, without its VAE."""
    from customdiff.models import base as base_model

    chosen = adapter_config.base_model(base)
    return base_model.load_pipeline(chosen, device=base_model.device(device), vae=None)
