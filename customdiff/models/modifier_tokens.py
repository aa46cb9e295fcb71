"""Modifier tokens: new words whose embeddings are learned, and nothing else of the text encoder.

The rows of the new tokens are a small parameter of their own, put over the frozen table's output. The table itself
is no parameter: no gradient, no optimizer state and no weight decay ever touches another word (the reference script
keeps all three for all 49,408 words, and only zeroes the gradients).
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from customdiff.errors import UserError
from customdiff.models.base import text_encoders

Rows = dict[str, Tensor]  # one word's embedding (D,) by text encoder


class ModifierEmbedding(nn.Module):
    """An embedding table with trained rows over it: ids (B, L) int64 to vectors (B, L, D) in the table's dtype.

    Attributes:
        table: the frozen vocabulary (V, D).
        rows: the trained rows (T, D), fp32, whatever the dtype of the table.
        ids: (T,) the token ids that the rows stand for.
    """

    def __init__(self, table: nn.Embedding, ids: list[int], rows: Tensor):
        super().__init__()
        self.table = table.requires_grad_(False)  # first, for transformers takes the first weight's dtype for all
        self.rows = nn.Embedding.from_pretrained(rows.detach().to(table.weight.device, torch.float32, copy=True), False)
        self.register_buffer("ids", torch.tensor(ids, device=table.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen table (V, D), which transformers asks for its size and dtype."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        matches = ids.unsqueeze(-1) == self.ids
        is_row = matches.any(-1)
        vectors = self.table(ids.masked_fill(is_row, 0))
        return torch.where(is_row.unsqueeze(-1), self.rows(matches.int().argmax(-1)).to(vectors.dtype), vectors)


def add_tokens(pipe: DiffusionPipeline, rows: dict[str, Rows]) -> dict[str, ModifierEmbedding]:
    """Add words to every tokenizer, and trained rows for them to every text encoder; the pipeline is changed in place.

    Args:
        rows: for each new word, such as `<new1>`, its embedding (D,) by text encoder: `text_encoder`, and in SDXL
            `text_encoder_2` too.

    Returns:
        The embedding that is now in place, by text encoder.

    Raises:
        UserError: a token is in the vocabulary already, or the rows have another width than the text encoder.
    """
    embeddings = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        table = encoder.get_input_embeddings()
        if isinstance(table, ModifierEmbedding):
            raise UserError("the pipeline holds modifier tokens already; load the base model afresh")
        for token, row in rows.items():
            width = len(row[name]) if name in row else 0
            if width != table.weight.shape[1]:
                raise UserError(
                    f"the modifier token {token} is {width} wide for {name}, the base model {table.weight.shape[1]}: "
                    "it was learned on another base model"
                )
        check_new(tokenizer, list(rows))
        tokenizer.add_tokens(list(rows))
        ids = tokenizer.convert_tokens_to_ids(list(rows))
        embeddings[name] = ModifierEmbedding(table, ids, torch.stack([row[name] for row in rows.values()]))
        encoder.set_input_embeddings(embeddings[name])
    return embeddings


def learned_rows(pipe: DiffusionPipeline) -> dict[str, Rows]:
    """Copies of the rows that `add_tokens` put in, as they are now: fp32 on the CPU, by token and text encoder."""
    rows: dict[str, Rows] = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        embedding = encoder.get_input_embeddings()
        words = tokenizer.convert_ids_to_tokens(embedding.ids.tolist())
        for word, row in zip(words, embedding.rows.weight, strict=True):
            rows.setdefault(word, {})[name] = row.detach().to("cpu", torch.float32, copy=True)
    return rows


def check_new(tokenizer: Any, tokens: list[str]) -> None:
    """Refuse a modifier token that is a word already: training it would change what that word means.

    Raises:
        UserError: names the token.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise UserError(
                f"modifier_token {token} is in the base model's vocabulary already; choose another, as <new1>"
            )


def initial_rows(pipe: DiffusionPipeline, words: str) -> Rows:
    """The embedding (D,) that a modifier token starts from: the mean over the tokens that `words` splits into.

    The reference refuses words of several tokens; their mean is the usual answer (textual inversion) and needs no
    knowledge of the vocabulary. A single token gives its own row exactly.

    Raises:
        UserError: a tokenizer finds no token in `words`.
    """
    rows = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        ids = tokenizer(words, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"initializer_token {words!r}: the base model's tokenizer finds no token in it")
        rows[name] = encoder.get_input_embeddings().weight[torch.tensor(ids)].detach().float().mean(0)
    return rows
