"""Text conditioning: tokenizers and text encoders of a pipeline, and captions as the UNet reads them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline


class Text(NamedTuple):
    """Encoded captions.

    Attributes:
        states: (N, L, D); in SDXL the states of both encoders, concatenated.
        pooled: (N, P), which SDXL adds to the timestep embedding; None in Stable Diffusion.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None

    def select(self, index: torch.Tensor) -> "Text":
        """The captions at `index` (M,)."""
        return Text(*(None if part is None else part[index] for part in self))

    def followed_by(self, *others: "Text") -> "Text":
        """These captions, then those of `others`, in the dtype of these."""
        columns = zip(self, *others, strict=True)
        return Text(
            *(
                None if one is None else torch.cat([one, *(other.to(one.dtype) for other in rest)])
                for one, *rest in columns
            )
        )


def text_encoders(pipe: DiffusionPipeline) -> dict[str, tuple[Any, torch.nn.Module]]:
    """Tokenizer and text encoder by the encoder's name in the pipeline: one in Stable Diffusion, two in SDXL."""
    names = [name for name in ("text_encoder", "text_encoder_2") if pipe.components.get(name) is not None]
    return {name: (pipe.components[name.replace("text_encoder", "tokenizer")], pipe.components[name]) for name in names}


def token_ids(pipe: DiffusionPipeline, captions: list[str]) -> list[torch.Tensor]:
    """Token ids of captions for each text encoder, padded and truncated to its length: (N, L) int64, on the CPU."""
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


def encode_text(encoders: Sequence[torch.nn.Module], ids: Sequence[torch.Tensor]) -> Text:
    """Encode captions given as `token_ids`; gradients flow to whatever trains in the encoders.

    Stable Diffusion uses the last hidden states; SDXL the last but one of both encoders, and the pooled projection of
    the second (Podell et al. 2023, section 2.1; diffusers' `encode_prompt`).
    """
    if len(encoders) == 1:
        return Text(encoders[0](ids[0])[0])
    found = [encoder(each, output_hidden_states=True) for encoder, each in zip(encoders, ids, strict=True)]
    return Text(torch.cat([one.hidden_states[-2] for one in found], -1), found[-1].text_embeds)


def text_of(pipe: DiffusionPipeline, captions: list[str]) -> Text:
    """`encode_text` of captions, on the pipeline's device."""
    encoders = [encoder for _, encoder in text_encoders(pipe).values()]
    return encode_text(encoders, [ids.to(encoders[0].device) for ids in token_ids(pipe, captions)])
