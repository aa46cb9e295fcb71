"""Train the UNet on cached latents and text states: v-prediction (Salimans and Ho 2022), min-SNR weights (Hang et al.
2023), Stable Diffusion's noise schedule, caption dropout for classifier-free guidance, EMA.
"""

import argparse
import copy
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from world.latents import scaling_factor
from world.loop import fit, last_checkpoint, load_params, save_beside


def build(params: dict, text_width: int) -> UNet2DConditionModel:
    """Stable Diffusion's UNet for 16 x 16 x 4 latents, with cross-attention at every level.

    `attention_head_dim` is read as the number of heads and must divide every width: the adapters that are put into
    the attention layers later count on it.
    """
    widths = params["widths"]
    if any(width % params["heads"] for width in widths):
        raise ValueError(f"world/params.yaml: unet.heads {params['heads']} must divide every width of {widths}")
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=params["layers"],
        norm_num_groups=params["norm_groups"],
        attention_head_dim=params["heads"],
        cross_attention_dim=text_width,
        down_block_types=["CrossAttnDownBlock2D"] * len(widths),
        up_block_types=["CrossAttnUpBlock2D"] * len(widths),
    )


def grown(state: dict[str, torch.Tensor], unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Weights of a UNet with one layer fewer in its lowest level, as weights of `unet` that compute the same.

    The new residual block and the new attention block on either side of the lowest level start as identities: what
    they add to their input is zero. `state` is returned as it is where it fits already.
    """
    target = unet.state_dict()
    level = len(unet.down_blocks) - 1
    up = f"up_blocks.0.resnets.{len(unet.up_blocks[0].resnets) - 1}.conv1.weight"
    if up in state:
        return state

    def earlier(key: str) -> str:
        """Where the earlier UNet holds a weight: its layers of the up block have numbers smaller by one."""
        return re.sub(r"^(up_blocks\.0\.(?:resnets|attentions)\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) - 1}", key)

    weights = {key: state[earlier(key)] if earlier(key) in state else value.clone() for key, value in target.items()}
    last = len(unet.down_blocks[-1].resnets) - 1
    for block in (f"down_blocks.{level}.resnets.{last}.conv2", "up_blocks.0.resnets.0.conv2",
                  f"down_blocks.{level}.attentions.{last}.proj_out", "up_blocks.0.attentions.0.proj_out"):  # fmt: skip
        weights[f"{block}.weight"].zero_()
        weights[f"{block}.bias"].zero_()
    shortcut = weights["up_blocks.0.resnets.0.conv_shortcut.weight"]  # of (what comes from below, the skip connection)
    shortcut.zero_()[:, : len(shortcut), 0, 0].fill_diagonal_(1)
    weights["up_blocks.0.resnets.0.conv_shortcut.bias"].zero_()
    return weights


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, for v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def importance(alphas: torch.Tensor, gamma: float, floor: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Where to draw timesteps and how to weigh them, each (1000,): density and weight.

    The min-SNR weights of v-prediction, min(SNR, gamma) / (SNR + 1), are nearly zero for much of Stable Diffusion's
    schedule on latents as small as ours. Timesteps are drawn in proportion to them, with a floor, and weighed by what
    remains: the same loss in expectation, with few samples spent where they count nothing.
    """
    snr = alphas / (1 - alphas)
    weight = snr.clamp(max=gamma) / (snr + 1)
    density = weight / weight.mean() + floor
    density = density / density.sum()
    return density, weight / (density * len(alphas))


def draw_timesteps(density: torch.Tensor, batch: int) -> torch.Tensor:
    """Stratified timesteps (B,): each batch covers the whole density, which steadies the gradient of small batches."""
    share = (torch.arange(batch, device=density.device) + torch.rand(batch, device=density.device)) / batch
    return torch.searchsorted(density.cumsum(0), share).clamp(max=len(density) - 1)


def unet_loss(
    unet: UNet2DConditionModel, alphas: torch.Tensor, latents: torch.Tensor, states: torch.Tensor, gamma: float
) -> dict[str, torch.Tensor]:
    """The v-prediction loss with min-SNR weights.

    Args:
        alphas: cumulative products of the schedule, (1000,).
        latents: scaled, (B, 4, 16, 16).
        states: text states, (B, 24, width).
    """
    density, weights = importance(alphas, gamma)
    t = draw_timesteps(density, len(latents))
    noise = torch.randn_like(latents)
    a = alphas[t][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * latents
    out = unet(noisy, t, encoder_hidden_states=states, return_dict=False)[0].float()
    squared = (out - target).square().mean(dim=(1, 2, 3))
    return {"loss": (weights[t] * squared).mean(), "v_mse": squared.detach().mean()}


# What the UNet learns from, in order; each phase begins with the weights of the one before.
PHASES = ("curriculum", "company", "varied", "busy", "coloured", "balanced", "paired")


def folders(work: Path) -> dict[str, Path]:
    """Phase -> where its checkpoint lies, in order."""
    return {phase: work / f"unet-{phase}" for phase in PHASES}


def released_weights(work: Path, phases: Sequence[str]) -> dict[str, torch.Tensor]:
    """The mean of the EMA weights after `phases`, fp32: a model soup (Wortsman et al. 2022).

    Until the last of them has been trained, the weights after the last phase that has.
    """
    checkpoints = [folders(work)[phase] / "checkpoint.pt" for phase in phases]
    if not all(path.exists() for path in checkpoints):
        checkpoints = [last_checkpoint(folders(work).values())]
    weights = [torch.load(path, map_location="cpu", weights_only=True)["ema"] for path in checkpoints]
    return {key: torch.stack([each[key] for each in weights]).mean(dim=0) for key in weights[0]}


class LatentSet:
    """The cached latents in memory; batches are drawn by step number, shuffled anew in every pass."""

    def __init__(self, work: Path, distribution: str, device: str) -> None:
        latents = np.load(work / f"latents-{distribution}.npz")
        states = np.load(work / f"states-{distribution}.npz")
        self.moments = torch.from_numpy(latents["moments"]).to(device)
        self.scaling_factor = scaling_factor(work)
        self.states = torch.from_numpy(states["states"]).to(device)
        self.caption = torch.from_numpy(states["caption"]).long().to(device)
        self._pass, self._order = -1, torch.empty(0)

    def batch(self, step: int, size: int, dropout: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (size, 4, 16, 16), sampled from the moments, and text states (size, 24, width)."""
        passes, place = divmod(step, len(self.moments) // size)
        if passes != self._pass:
            order = torch.Generator().manual_seed(seed * 1000 + passes)
            self._order = torch.randperm(len(self.moments), generator=order).to(self.moments.device)
            self._pass = passes
        rows = self._order[place * size : (place + 1) * size]
        mean, log_variance = self.moments[rows].float().chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * torch.randn_like(mean)
        kept = torch.rand(size, device=rows.device) >= dropout
        return latents * self.scaling_factor, self.states[self.caption[rows] * kept].float()


def main() -> None:
    """Train, or continue."""
    params = load_params("unet")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--distribution", choices=PHASES, default=PHASES[0])
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--batch", type=int, default=params["batch"])
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(params["seed"])
    latents = LatentSet(arguments.work, arguments.distribution, arguments.device)
    unet = build(params, latents.states.shape[-1]).to(arguments.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(unet).requires_grad_(False)
    alphas = scheduler().alphas_cumprod.to(arguments.device)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        batch, states = latents.batch(step, arguments.batch, params["caption_dropout"], params["seed"])
        return unet_loss(unet, alphas, batch.contiguous(memory_format=torch.channels_last), states, params["snr_gamma"])

    folder = folders(arguments.work)[arguments.distribution]
    earlier = PHASES[: PHASES.index(arguments.distribution)]
    before = last_checkpoint(folders(arguments.work)[phase] for phase in earlier)
    begins = before is not None and not (folder / "checkpoint.pt").exists()
    if begins:
        folder.mkdir(parents=True)
        state = torch.load(before, map_location="cpu", weights_only=True)
        save_beside(state | {key: grown(state[key], unet) for key in ("model", "ema")}, folder / "checkpoint.pt")
    fit(
        folder,
        unet,
        loss_at,
        minutes=arguments.minutes or params["minutes"][arguments.distribution],
        peak_lr=params["peak_lr"],
        weight_decay=params["weight_decay"],
        ema=ema,
        ema_decay=params["ema"],
        muon=params["muon"],
        seed=params["seed"],
        device=arguments.device,
        restart=arguments.restart or begins,
    )


if __name__ == "__main__":
    main()
