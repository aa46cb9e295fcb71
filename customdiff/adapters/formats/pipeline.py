"""A whole diffusers pipeline with the adapter folded into it, for programs that know nothing of adapters."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats.changes import ExportSource, check_embeddings
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding, check_new
from customdiff.models.text import text_encoders


def check(config: AdapterConfig, rank: int | None) -> None:
    """Refuse a rank: weights are whole here."""
    if rank is not None:
        raise UserError("--rank: a pipeline holds whole weights; --format lora and kohya have a rank")


def write(source: ExportSource, folder: Path, rank: int | None) -> float:
    """Fold what was learned into the source's pipeline, and save all of it as safetensors."""
    source.pipe.unet.load_state_dict(source.after, strict=False)
    add_embeddings(source.pipe, source.adapter.embeddings)
    for part in filter(None, (source.pipe.unet, source.pipe.components.get("vae"))):
        part.to(memory_format=torch.contiguous_format)  # safetensors holds no other
    source.pipe.save_pretrained(folder)
    return 0.0


def verify(source: ExportSource, folder: Path, error: float) -> None:
    """Load the folder by diffusers' plain call, and compare every weight of every part with what was saved."""
    loaded = DiffusionPipeline.from_pretrained(folder)
    for name, part in source.pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found = loaded.components[name].state_dict()
            for key, weight in part.state_dict().items():
                if key not in found or not torch.equal(found[key], weight):
                    raise UserError(f"the written files do not give back what was learned: {name} {key} differs")
    check_embeddings(loaded, source.adapter.embeddings)


def instructions(config: AdapterConfig, folder: Path) -> str:
    """The call that opens it."""
    return f'diffusers opens it alone:\n  pipe = DiffusionPipeline.from_pretrained("{folder}")'


def add_embeddings(pipe: DiffusionPipeline, rows: dict[str, TokenEmbedding]) -> None:
    """Make words a part of every tokenizer and of every text encoder's own table; the pipeline is changed in place.

    Args:
        rows: embeddings (D,) by word and text encoder.
    """
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        words = list(rows)
        check_new(tokenizer, words)
        tokenizer.add_tokens(words)
        ids = tokenizer.convert_tokens_to_ids(words)
        # Some bases pad their table beyond the vocabulary: those rows stay.
        size = max(encoder.get_input_embeddings().num_embeddings, max(ids) + 1)
        encoder.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            encoder.get_input_embeddings().weight[ids] = torch.stack([row[name] for row in rows.values()])
