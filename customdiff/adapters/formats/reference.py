"""The folder that diffusers' `train_custom_diffusion.py` writes, with its own `save_attn_procs`.

pytorch_custom_diffusion_weights.safetensors or .bin    the former without an entry for self-attention
<new1>.safetensors or .bin                              {"<new1>": (D,)}
"""

from pathlib import Path

from torch import Tensor

from customdiff.adapters.adapter import WEIGHTS, token_file
from customdiff.adapters.formats.changes import unet_name
from customdiff.adapters.formats.foreign import ImportedWeights, ImportRequest, by_name, read_pickle, read_safetensors
from customdiff.errors import UserError


def read(path: Path, request: ImportRequest) -> ImportedWeights:
    """Read the folder; of two files with the same tensors the safetensors.

    Raises:
        UserError: a file is missing, damaged, or a pickle that is not allowed.
    """
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give the one that holds {WEIGHTS} and each token's file")
    file = _either(path, WEIGHTS)
    found = _read(file, request)
    rows = {}
    for token in request.tokens:
        named = _read(_either(path, token_file(token)), request)
        rows |= {word: {"text_encoder": row} for word, row in named.items()}
    # Self-attention trains nothing: its entries are empty dicts in the script's .bin, and empty tensors in ours.
    full = {name: weight for name, weight in found.items() if isinstance(weight, Tensor) and weight.numel()}
    weights = {unet_name(name): weight for name, weight in full.items()}
    return ImportedWeights(weights, rows, file)


def _either(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.safetensors", folder / f"{name}.bin"):
        if path.is_file():
            return path
    raise UserError(f"{folder}: has neither {name}.safetensors nor {name}.bin")


def _read(path: Path, request: ImportRequest) -> dict:
    return read_safetensors(path) if path.suffix == ".safetensors" else by_name(read_pickle(path, request), path)
