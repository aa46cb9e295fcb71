"""Text conditioning: a pipeline's tokenizers and text encoders, and captions encoded for the UNet."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Text(NamedTuple):
    """Encoded captions.

    Attributes:
        states: (N, L, D); in SDXL the states of both encoders, concatenated.
        pooled: (N, P), which SDXL adds to the timestep embedding; None in Stable Diffusion.
    """

    states: Tensor
    pooled: Tensor | None = None

    def select(self, index: Tensor) -> "Text":
        """The captions at `index` (M,)."""
        return Text(self.states[index], None if self.pooled is None else self.pooled[index])

    def followed_by(self, *others: "Text") -> "Text":
        """These captions, then those of `others`, cast to the dtype of these."""
        texts = (self, *others)
        pooled = [text.pooled for text in texts if text.pooled is not None]
        return Text(_concatenate([text.states for text in texts]), _concatenate(pooled) if pooled else None)


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Tensors (N_i, ...) joined along their first axis, in the dtype of the first."""
    return torch.cat([part.to(parts[0].dtype) for part in parts])


def text_encoders(pipe: DiffusionPipeline) -> dict[str, tuple[PreTrainedTokenizerBase, PreTrainedModel]]:
    """Tokenizer and text encoder by the encoder's component name: one in Stable Diffusion, two in SDXL."""
    names = [name for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name) is not None]
    return {name: (pipe.components[name.replace("text_encoder", "tokenizer")], pipe.components[name]) for name in names}


def token_ids(pipe: DiffusionPipeline, captions: list[str]) -> list[Tensor]:
    """Token ids (N, L) int64 of captions for each text encoder, padded or truncated to its length, on the CPU."""
    return [
        tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        for tokenizer, _ in text_encoders(pipe).values()
    ]


def encode_text(encoders: Sequence[nn.Module], ids: Sequence[Tensor]) -> Text:
    """Encode captions given as token ids; gradients flow to the encoders' trainable parameters.

    Stable Diffusion uses the last hidden states. SDXL uses the penultimate hidden states of both encoders and the
    pooled projection of the second (Podell et al. 2023, section 2.1; diffusers' `encode_prompt`).

    Args:
        ids: (N, L) int64 for each encoder; see `token_ids`.
    """
    if len(encoders) == 1:
        return Text(encoders[0](ids[0])[0])
    outputs = [encoder(ids_, output_hidden_states=True) for encoder, ids_ in zip(encoders, ids, strict=True)]
    return Text(torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1].text_embeds)


def text_of(pipe: DiffusionPipeline, captions: list[str]) -> Text:
    """Encode captions on the pipeline's device."""
    encoders = [encoder for _, encoder in text_encoders(pipe).values()]
    return encode_text(encoders, [ids.to(encoders[0].device) for ids in token_ids(pipe, captions)])
