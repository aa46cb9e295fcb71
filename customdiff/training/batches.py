"""Training batches, each determined by the seed and its number."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from customdiff.config import Params
from customdiff.models.text import Text, text_of, token_ids
from customdiff.preparation import prepared_set
from customdiff.preparation.prepared_set import PreparedSet

ENCODE_BATCH_SIZE = 16  # class captions; more would raise the memory peak


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch: I instance images, then the same number of class images if any are used.

    Attributes:
        latents: (B, C, h, w) fp32, scaled.
        noise: (B, C, h, w) fp32, standard normal.
        timesteps: (B,) int64.
        mask: (I, 1, h, w) fp32, weights of the loss: 0 outside the valid region, else 1, or `train.mask_weight`
            outside the subject.
        ids: (I, L) int64 token ids of the instance captions for each text encoder.
        class_text: B - I encoded class captions; None without class images.
        time_ids: (B, 6) fp32, SDXL's size and crop conditioning: height and width of the photo, top and left of the
            crop, target height and width.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    mask: Tensor
    ids: list[Tensor]
    class_text: Text | None
    time_ids: Tensor


class Batches:
    """Batches of a run, drawn from its prepared sets; batch n depends only on the seed and n."""

    def __init__(
        self,
        sets: Sequence[PreparedSet],
        pipe: DiffusionPipeline,
        vae: AutoencoderKL | None,
        scaling_factor: float,
        params: Params,
        accelerator: Accelerator,
    ):
        """Create the batches.

        Args:
            sets: the instance set, then the class set with prior preservation.
            pipe: base model with modifier tokens.
            vae: encodes pixels if the sets contain no VAE moments.
            scaling_factor: of the VAE's latents.
        """
        self.sets = sets
        self.vae, self.scaling_factor = vae, scaling_factor
        self.seed, self.batch_size = params.base.seed, params.train.batch_size
        self.mask_weight = params.train.mask_weight
        self.num_timesteps = pipe.scheduler.config.num_train_timesteps
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        self.device = accelerator.device
        self.target_size = torch.tensor([params.prepare.resolution] * 2)
        self.ids = [ids.to(self.device) for ids in token_ids(pipe, sets[0].captions)]
        if len(sets) > 1:
            self._encode_class_captions(pipe, sets[1].captions)

    def _encode_class_captions(self, pipe: DiffusionPipeline, captions: list[str]) -> None:
        """Encode each distinct class caption once; they contain no modifier token, so their states do not change."""
        distinct = sorted(set(captions))
        with torch.no_grad():
            first, *others = (
                text_of(pipe, distinct[start : start + ENCODE_BATCH_SIZE])
                for start in range(0, len(distinct), ENCODE_BATCH_SIZE)
            )
        self.class_text = first.followed_by(*others)
        places = {caption: place for place, caption in enumerate(distinct)}
        self.class_place = torch.tensor([places[caption] for caption in captions])

    def draw(self, number: int) -> Batch:
        """This process's part of micro-batch `number` of the run, counted from 0."""
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        size = self.batch_size * self.processes
        chosen = [
            prepared_set.batch_indices(len(prepared), size, self.seed + kind, number)[own]
            for kind, prepared in enumerate(self.sets)
        ]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        drawn = [
            self._draw_set(prepared, index, own, size, generator)
            for prepared, index in zip(self.sets, chosen, strict=True)
        ]
        clean, noise, timesteps, time_ids = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return Batch(
            latents=clean,
            noise=noise,
            timesteps=timesteps,
            mask=self._to_device(prepared_set.loss_weights(self.sets[0], chosen[0], self.mask_weight)),
            ids=[ids[chosen[0]] for ids in self.ids],
            class_text=self.class_text.select(self.class_place[chosen[1]]) if len(chosen) > 1 else None,
            time_ids=time_ids,
        )

    def _draw_set(
        self, prepared: PreparedSet, index: list[int], own: slice, size: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Latents, noise, timesteps and time ids of one set; every process draws the whole batch and keeps its part."""
        mean, std = self._moments(prepared, index)
        posterior, noise = torch.randn(2, size, *mean.shape[1:], generator=generator)[:, own]
        timesteps = torch.randint(0, self.num_timesteps, (size,), generator=generator)[own]
        clean = prepared_set.sample(mean, std, self.scaling_factor, posterior)
        time_ids = torch.cat([prepared.framing[index], self.target_size.expand(len(index), 2)], 1).float()
        return [self._to_device(x) for x in (clean, noise, timesteps, time_ids)]

    def _to_device(self, x: Tensor) -> Tensor:
        """Copy to the device; pinned memory lets the training loop continue during a copy to a GPU."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _moments(self, prepared: PreparedSet, index: list[int]) -> tuple[Tensor, Tensor]:
        if prepared.mean is not None and prepared.std is not None:
            return prepared.mean[index], prepared.std[index]
        if prepared.pixels is None or self.vae is None:
            raise ValueError("a prepared set of pixels needs the VAE")
        return prepared_set.encode(self.vae, prepared_set.to_pixels(prepared.pixels[index]))
