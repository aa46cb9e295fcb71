"""Adapters of random weights, for the tests of publishing."""

from pathlib import Path

import torch
from conftest import concept_values, tiny_params

from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.models import base, methods, modifier_tokens
from customdiff.models.text import text_encoders


def write_adapter(base_folder: Path, folder: Path, tokens: tuple[str, ...] = ("<new1>",), **changes: object) -> Path:
    """Write an adapter whose weights are far from the base model's; `changes` go into adapter.json."""
    concepts = {name: concept_values(token, name) for token, name in zip(tokens, ("cat", "dog"), strict=False)}
    for concept in concepts.values():
        del concept["source"]
    config = AdapterConfig.model_validate(
        {
            "base": {"model": str(base_folder), "revision": None, "variant": None},
            "concepts": concepts,
            "method": "custom_diffusion",
            "freeze_model": "crossattn_kv",
            "lora_rank": 4,
            "resolution": 32,
            "steps": 6,
            "seed": 42,
            "versions": {"torch": "2.15.0"},
        }
        | changes
    )
    pipe = base.load_pipeline(tiny_params(base_folder).base)
    torch.manual_seed(7)
    widths = {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}
    embeddings = {token: {name: torch.randn(width) for name, width in widths.items()} for token in tokens}
    modifier_tokens.add_tokens(pipe, embeddings)
    with torch.no_grad():
        for weight in methods.inject(pipe.unet, config).values():
            weight += 0.3 * torch.randn_like(weight)
    adapter.save(adapter.from_pipeline(pipe, config), folder)
    return folder
