"""Strength of an adapter in a pipeline: 0 is the base model, 1 the adapter, others lie on the line through both."""

import torch
from diffusers import DiffusionPipeline

from customdiff.adapters.adapter import Adapter, full_weights
from customdiff.adapters.config import LearnedConcept
from customdiff.models import attention, methods, modifier_tokens, text
from customdiff.models.modifier_tokens import TokenEmbedding


def set_strength(pipe: DiffusionPipeline, injected: Adapter, strength: float) -> None:
    """Scale the change of the adapter that was injected into a pipeline.

    Each trained weight becomes W0 + s (W - W0), where W0 is the base model's. The second factor of a LoRA, which starts
    at zero, is multiplied by s. The embedding of a modifier token moves on the line from the mean embedding of its
    initializer, where its training started.

    Args:
        pipe: changed in place; `adapter.inject` or `adapter.load` put the adapter in.
        strength: s; 1 gives the adapter's weights exactly, and 0 the base model's.
    """
    learned = full_weights(injected, pipe)
    before = attention.originals(pipe.unet, injected.config.freeze_model) if injected.config.method != "lora" else {}
    with torch.no_grad():
        for name, parameter in methods.trainable(pipe.unet).items():
            if ".lora_A." in name:
                continue
            start = before[name].float().cpu() if before else torch.zeros_like(learned[name])
            parameter.copy_(_on_line(start, learned[name].float(), strength))
        for concept in injected.config.concepts.values():
            embedding = injected.embeddings[concept.modifier_token]
            _set_embedding(pipe, concept.modifier_token, _embedding(pipe, concept, embedding, strength))


def _on_line(start: torch.Tensor, end: torch.Tensor, share: float) -> torch.Tensor:
    """The point at a share of the way, exact at both ends."""
    return end if share == 1 else start + share * (end - start)


def _embedding(
    pipe: DiffusionPipeline, concept: LearnedConcept, learned: TokenEmbedding, strength: float
) -> TokenEmbedding:
    """The embedding of a concept's token; where nothing says what it started from, as it was learned."""
    words = concept.initializer or concept.class_prompt
    if not words or strength == 1:
        return learned
    start = modifier_tokens.initial_embedding(pipe, words)
    return {name: _on_line(start[name].cpu(), vector.float(), strength) for name, vector in learned.items()}


def _set_embedding(pipe: DiffusionPipeline, token: str, embedding: TokenEmbedding) -> None:
    for name, (tokenizer, encoder) in text.text_encoders(pipe).items():
        layer = encoder.get_input_embeddings()
        place = layer.ids.tolist().index(tokenizer.convert_tokens_to_ids(token))
        layer.trained.weight[place].copy_(embedding[name])
