"""Train the autoencoder: 64 x 64 pictures to 16 x 16 latents of 4 channels and back.

`--decoder` goes on with the encoder frozen: latents that a UNet has been trained on stay valid.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from world.loop import fit, load_params
from world.scenes import SIDE, Sprites, compose, to_tensor, world_distribution


def build(params: dict) -> AutoencoderKL:
    """Stable Diffusion's autoencoder, narrow, without attention in the middle (the slowest part at this size)."""
    levels = len(params["widths"])
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=params["widths"],
        layers_per_block=params["layers"],
        norm_num_groups=params["norm_groups"],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, kl_weight: float, frozen: bool) -> dict[str, torch.Tensor]:
    """Reconstruction (absolute + squared error, and of the edges) and the KL term; images (B, 3, 64, 64) in -1..1."""
    with torch.set_grad_enabled(not frozen):
        posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    out = vae.decode(latents).sample.float()
    squared = F.mse_loss(out, images)
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(images), strict=True))
    kl = posterior.kl().mean()
    loss = squared + 0.25 * F.l1_loss(out, images) + 0.25 * edge + kl_weight * kl
    return {"loss": loss, "psnr": 10 * torch.log10(4 / squared.detach()), "kl": kl.detach()}


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--restart", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    params = load_params("vae")
    stage = load_params("decoder") if arguments.decoder else params
    torch.manual_seed(params["seed"])
    sprites = Sprites.load(arguments.work / "sprites")
    of = world_distribution(sprites)
    vae = build(params).to(arguments.device, memory_format=torch.channels_last)
    folder = arguments.work / ("decoder" if arguments.decoder else "vae")
    if arguments.decoder:
        vae.load_state_dict(torch.load(arguments.work / "vae/checkpoint.pt", weights_only=True)["model"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    first = 10_000_000 if arguments.decoder else 0  # other scenes than the first training's

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        start = first + step * params["batch"]
        scenes = [compose(sprites, of, "base", start + i) for i in range(params["batch"])]
        images = to_tensor([scene.image for scene in scenes]).to(arguments.device, memory_format=torch.channels_last)
        return vae_loss(vae, images, params["kl_weight"], arguments.decoder)

    fit(
        folder,
        vae,
        loss_at,
        minutes=arguments.minutes or stage["minutes"],
        peak_lr=stage["peak_lr"],
        muon=stage["muon"],
        seed=params["seed"],
        device=arguments.device,
        restart=arguments.restart,
    )


if __name__ == "__main__":
    main()
