"""Format `pipeline`: a complete diffusers pipeline with the adapter merged into its weights."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, check_embeddings
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding, check_new
from customdiff.models.text import text_encoders


def check(config: AdapterConfig, rank: int | None) -> None:
    """Check that no rank is given.

    Raises:
        UserError: a rank is given.
    """
    if rank is not None:
        raise UserError("--rank: not available for this format; use --format lora or kohya")


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Merge the adapter into the source's pipeline and save it as safetensors."""
    source.pipe.unet.load_state_dict(source.after, strict=False)
    add_embeddings(source.pipe, source.adapter.embeddings)
    for part in filter(None, (source.pipe.unet, source.pipe.components.get("vae"))):
        part.to(memory_format=torch.contiguous_format)  # required by safetensors
    source.pipe.save_pretrained(folder)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load the folder with `DiffusionPipeline.from_pretrained` and compare all weights with the saved ones."""
    loaded = DiffusionPipeline.from_pretrained(folder)
    for name, part in source.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            loaded_weights = loaded.components[name].state_dict()
            for key, weight in part.state_dict().items():
                if key not in loaded_weights or not torch.equal(loaded_weights[key], weight):
                    raise UserError(f"exported files do not reproduce the adapter: {name} {key} differs")
    check_embeddings(loaded, source.adapter.embeddings)


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The call that loads the folder."""
    return f'in diffusers:\n  pipe = DiffusionPipeline.from_pretrained("{folder}")'


def add_embeddings(pipe: DiffusionPipeline, embeddings: dict[str, TokenEmbedding]) -> None:
    """Add words to every tokenizer and to every text encoder's embedding table; the pipeline is changed in place.

    Args:
        embeddings: embeddings (D,) by word and text encoder.
    """
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        words = list(embeddings)
        check_new(tokenizer, words)
        tokenizer.add_tokens(words)
        ids = tokenizer.convert_tokens_to_ids(words)
        # Some base models pad their table beyond the vocabulary; keep its length.
        size = max(encoder.get_input_embeddings().num_embeddings, max(ids) + 1)
        encoder.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            vectors = torch.stack([embedding[name] for embedding in embeddings.values()])
            encoder.get_input_embeddings().weight[ids] = vectors
