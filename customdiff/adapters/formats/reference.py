"""Format `diffusers`: the folder that diffusers' `train_custom_diffusion.py` writes with `save_attn_procs`.

pytorch_custom_diffusion_weights.safetensors or .bin    only the .bin has entries for self-attention
<new1>.safetensors or .bin                              {"<new1>": (D,)}
"""

from pathlib import Path

from torch import Tensor

from customdiff.adapters.adapter import WEIGHTS, token_file
from customdiff.adapters.formats.changes import unet_name
from customdiff.adapters.formats.foreign import (
    ImportedWeights,
    ImportRequest,
    read_pickle,
    read_safetensors,
    string_keyed,
)
from customdiff.errors import UserError
from customdiff.models.modifier_tokens import TokenEmbedding


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read the folder; safetensors files take precedence over .bin files.

    Raises:
        UserError: a file is missing, damaged, or a pickle that is not allowed.
    """
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give the folder of {WEIGHTS} and the tokens' files")
    file = _either(path, WEIGHTS)
    tensors = _read(file, request)
    embeddings: dict[str, TokenEmbedding] = {}
    for token in request.tokens:
        vectors = _read(_either(path, token_file(token)), request)
        embeddings |= {name: {"text_encoder": vector} for name, vector in vectors.items()}
    # Entries of self-attention, which does not train, are empty: dicts in the script's .bin, tensors in our files.
    weights = {
        unet_name(name): weight for name, weight in tensors.items() if isinstance(weight, Tensor) and weight.numel()
    }
    return ImportedWeights(weights, embeddings, file)


def _either(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.safetensors", folder / f"{name}.bin"):
        if path.is_file():
            return path
    raise UserError(f"{folder}: has neither {name}.safetensors nor {name}.bin")


def _read(path: Path, request: ImportRequest) -> dict:
    return read_safetensors(path) if path.suffix == ".safetensors" else string_keyed(read_pickle(path, request), path)
