"""Modifier tokens: new vocabulary entries whose embeddings are the only part of the text encoder that trains.

The embeddings of the new tokens are a small parameter of their own beside the frozen table. The table is not a
parameter, so no gradient, optimizer state or weight decay reaches any other token. (The reference script keeps all
three for all 49,408 tokens and zeroes the gradients.)
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from customdiff.errors import UserError
from customdiff.models.text import text_encoders

TokenEmbedding = dict[str, Tensor]  # the embedding (D,) of one token, by text encoder


class ModifierEmbedding(nn.Module):
    """An embedding layer with trained entries: ids (B, L) int64 to vectors (B, L, D) in the table's dtype.

    Attributes:
        table: the frozen vocabulary (V, D).
        trained: the trained entries (T, D), fp32 whatever the dtype of the table.
        ids: (T,) token ids of the trained entries.
    """

    def __init__(self, table: nn.Embedding, ids: list[int], embeddings: Tensor):
        super().__init__()
        self.table = table.requires_grad_(False)  # registered first: transformers reads the dtype of the first weight
        own = embeddings.detach().to(table.weight.device, torch.float32, copy=True)
        self.trained = nn.Embedding.from_pretrained(own, freeze=False)
        self.register_buffer("ids", torch.tensor(ids, device=table.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table (V, D); transformers reads its size and dtype."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        matches = ids.unsqueeze(-1) == self.ids
        is_trained = matches.any(-1)
        vectors = self.table(ids.masked_fill(is_trained, 0))
        own = self.trained(matches.int().argmax(-1)).to(vectors.dtype)
        return torch.where(is_trained.unsqueeze(-1), own, vectors)


def add_tokens(pipe: DiffusionPipeline, embeddings: dict[str, TokenEmbedding]) -> dict[str, ModifierEmbedding]:
    """Add tokens to every tokenizer and their embeddings to every text encoder; the pipeline is changed in place.

    Args:
        embeddings: for each new token, such as `<new1>`, its embedding (D,) by text encoder: `text_encoder`, and in
            SDXL `text_encoder_2` too.

    Returns:
        The embedding layer now in place, by text encoder.

    Raises:
        UserError: a token is in the vocabulary already, or its embedding does not have the text encoder's width.
    """
    layers = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        table = encoder.get_input_embeddings()
        if isinstance(table, ModifierEmbedding):
            raise UserError("the pipeline has modifier tokens already; load the base model again")
        for token, embedding in embeddings.items():
            width = len(embedding[name]) if name in embedding else 0
            if width != table.weight.shape[1]:
                raise UserError(
                    f"modifier token {token}: its embedding for {name} has width {width}, the base model needs "
                    f"{table.weight.shape[1]}; it was trained on another base model"
                )
        check_new(tokenizer, list(embeddings))
        tokenizer.add_tokens(list(embeddings))
        ids = tokenizer.convert_tokens_to_ids(list(embeddings))
        layers[name] = ModifierEmbedding(table, ids, torch.stack([each[name] for each in embeddings.values()]))
        encoder.set_input_embeddings(layers[name])
    return layers


def learned_embeddings(pipe: DiffusionPipeline) -> dict[str, TokenEmbedding]:
    """Copies of the current trained embeddings, fp32 on the CPU, by token and text encoder."""
    embeddings: dict[str, TokenEmbedding] = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        layer = encoder.get_input_embeddings()
        tokens = tokenizer.convert_ids_to_tokens(layer.ids.tolist())
        for token, vector in zip(tokens, layer.trained.weight, strict=True):
            embeddings.setdefault(token, {})[name] = vector.detach().to("cpu", torch.float32, copy=True)
    return embeddings


def check_new(tokenizer: Any, tokens: list[str]) -> None:
    """Refuse a modifier token that the vocabulary has already: training it would change its meaning.

    Raises:
        UserError: names the token.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise UserError(f"modifier_token {token}: is in the base model's vocabulary already; use one like <new1>")


def initial_embedding(pipe: DiffusionPipeline, words: str) -> TokenEmbedding:
    """The embedding (D,) that a modifier token starts from: the mean over the tokens of `words`.

    The reference accepts single tokens only; a single token gives its own embedding exactly.

    Raises:
        UserError: a tokenizer finds no token in `words`.
    """
    embedding = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        ids = tokenizer(words, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"initializer_token {words!r}: contains no token of the base model's vocabulary")
        embedding[name] = encoder.get_input_embeddings().weight[torch.tensor(ids)].detach().float().mean(0)
    return embedding
