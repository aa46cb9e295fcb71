"""Modifier tokens: new vocabulary entries whose embeddings are the only trained part of the text encoder.

The embeddings of the new tokens are a small parameter beside the frozen embedding table. No gradient, optimizer state
or weight decay reaches any other token. (The reference script keeps all three for all 49,408 tokens and zeroes the
gradients of the others.)
"""

import re

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from customdiff.errors import UserError
from customdiff.models.text import text_encoders

OLD_EOS = 2  # in the configs of CLIP models from before transformers 4.31, whatever their end token is

TokenEmbedding = dict[str, Tensor]  # embedding (D,) of one token by text encoder


def without_tokens(prompt: str, *tokens: str) -> str:
    """A prompt without its modifier tokens: "photo of a <new1> cat" -> "photo of a cat".

    The base model is given this text, and the paper compares images with it (section 4, and the prompts of
    CustomConcept101): neither model nor judge knows the token, and the class stays.
    """
    for token in tokens:
        prompt = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)\s?", "", prompt)
    return " ".join(prompt.split())


class ModifierEmbedding(nn.Module):
    """Embedding layer with some trained entries: ids (B, L) int64 to vectors (B, L, D) in the table's dtype.

    Attributes:
        table: the frozen vocabulary (V, D).
        trained: the trained entries (T, D), always fp32.
        ids: (T,) token ids of the trained entries.
    """

    ids: Tensor

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
        embeddings: embedding (D,) of each new token, such as `<new1>`, by text encoder: `text_encoder`, and also
            `text_encoder_2` in SDXL.

    Returns:
        The new embedding layer of each text encoder.

    Raises:
        UserError: a token is already in the vocabulary, or its embedding does not have the text encoder's width.
    """
    layers = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        table = encoder.get_input_embeddings()
        if isinstance(table, ModifierEmbedding):
            raise UserError("the pipeline already has modifier tokens; load the base model again")
        for token, embedding in embeddings.items():
            width = len(embedding[name]) if name in embedding else 0
            if width != table.weight.shape[1]:
                raise UserError(
                    f"modifier token {token}: its embedding for {name} has width {width} instead of "
                    f"{table.weight.shape[1]}; it was trained on another base model"
                )
        check_new(tokenizer, list(embeddings))
        tokenizer.add_tokens(list(embeddings))
        ids = tokenizer.convert_tokens_to_ids(list(embeddings))
        vectors = torch.stack([embedding[name] for embedding in embeddings.values()])
        layers[name] = ModifierEmbedding(table, ids, vectors)
        encoder.set_input_embeddings(layers[name])
        _pool_at_end(encoder, tokenizer)
    return layers


def _pool_at_end(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take the pooled text state of SDXL at the end token although the config has an old default, `eos_token_id: 2`.

    For that value transformers takes it at the token with the largest id: a modifier token, whose state knows nothing
    of the words behind it.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == OLD_EOS:
            module.eos_token_id = tokenizer.eos_token_id


def learned_embeddings(pipe: DiffusionPipeline) -> dict[str, TokenEmbedding]:
    """Copies of the trained embeddings, fp32 on the CPU, by token and text encoder."""
    embeddings: dict[str, TokenEmbedding] = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        layer = encoder.get_input_embeddings()
        tokens = tokenizer.convert_ids_to_tokens(layer.ids.tolist())
        for token, vector in zip(tokens, layer.trained.weight, strict=True):
            embeddings.setdefault(token, {})[name] = vector.detach().to("cpu", torch.float32, copy=True)
    return embeddings


def check_new(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Reject modifier tokens that are already in the vocabulary, because training would change their meaning.

    CLIP's tokenizer lowercases prompts and new tokens alike, so `Cat` would take the place of `cat`.

    Raises:
        UserError: a token is in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if any(name in vocabulary or f"{name}</w>" in vocabulary for name in (token, token.lower())):
            raise UserError(f"modifier_token {token}: already in the base model's vocabulary; use one such as <new1>")


def initial_embedding(pipe: DiffusionPipeline, words: str) -> TokenEmbedding:
    """Initial embedding (D,) of a modifier token, by text encoder: the mean embedding of the tokens of `words`.

    The reference accepts a single token only, for which the mean is its embedding exactly.

    Raises:
        UserError: `words` contains no token.
    """
    embedding = {}
    for name, (tokenizer, encoder) in text_encoders(pipe).items():
        ids = tokenizer(words, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(
                f"initializer_token {words!r}: has no token in the base model's vocabulary; use a word such as cat"
            )
        embedding[name] = encoder.get_input_embeddings().weight[torch.tensor(ids)].detach().float().mean(0)
    return embedding
