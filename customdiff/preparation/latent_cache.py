"""Cache of VAE moments, keyed by the pixels of a batch of views: editing a caption encodes nothing again."""

import hashlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customdiff.files import atomic_file
from customdiff.preparation import prepared_set


class LatentCache:
    """VAE moments in `folder`, one file per batch of views.

    The key is a hash of the pixels, the weights of the VAE, and what decides the last bits of its output: the batch,
    the device, the number of threads and the release of torch.
    """

    def __init__(self, folder: Path, vae: AutoencoderKL) -> None:
        self.folder, self.vae = folder, vae
        self._identity = hashlib.sha256(f"{vae.device.type} {torch.get_num_threads()} {torch.__version__}".encode())
        for name, weight in sorted(vae.state_dict().items()):
            self._identity.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        self._used: set[str] = set()
        self.encoded = 0  # batches that were not in the cache

    def encode(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pixels (B, 3, H, W) float32 in -1..1; see prepared_set."""
        digest = self._identity.copy()
        digest.update(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
        path = self.folder / f"{digest.hexdigest()}.safetensors"
        self._used.add(path.name)
        with suppress(FileNotFoundError, SafetensorError, KeyError):  # not cached, removed meanwhile, or damaged
            found = load_file(path)
            return found["mean"], found["std"]
        mean, std = prepared_set.encode(self.vae, torch.from_numpy(pixels))
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as incoming:
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, incoming)
        self.encoded += 1
        return mean, std

    def prune(self) -> None:
        """Remove the files that `encode` did not use."""
        for path in self.folder.glob("[!.]*"):  # hidden files are being written by other processes
            if path.name not in self._used:
                path.unlink(missing_ok=True)
