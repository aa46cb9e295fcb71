"""Train the autoencoder: 128 x 128 images to 16 x 16 latents of 4 channels and back.

The latent space is anchored to that of an earlier autoencoder (`anchor` in world/params.yaml): besides reconstruction,
the encoder's mean is trained to equal the earlier encoder's for the same image at half the size. A UNet that was
trained on the earlier latents then works with the new autoencoder.

Later phases continue on harder scenes. `refined` trains the whole with a stronger feature loss, anchored to the latents
it had: a UNet that was trained on them needs little further training. `sharpened` and `crisp` train the decoder alone,
so that the latents stay what they are. `crisp` has the discriminator: losses that compare pixel with pixel blur edges.
"""

import argparse
import copy
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from world.discriminator import Discriminator, adversarial_terms
from world.individuals import with_more_individuals
from world.loop import fit, last_checkpoint, load_params
from world.scenes import CLIP_SIDE, SIDE, Sprites, compose, detailed_distribution, to_tensor, world_distribution


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


def widened(key: str, value: torch.Tensor, noise: float) -> torch.Tensor:
    """A smaller autoencoder's parameter with every inner channel doubled (Net2WiderNet, Chen et al. 2016).

    Both copies of a channel lie in one group of the same normalisation, which therefore gives what it gave. The input
    of the decoder and the outputs of either half stay as they are.

    Args:
        noise: added, relative to the standard deviation, so that the copies do not stay equal.
    """
    if key.startswith(("quant_conv", "post_quant_conv")):
        return value
    if not key.endswith("conv_out.weight") and not key.endswith("conv_out.bias"):
        value = value.repeat_interleave(2, dim=0)
    if value.ndim == 4 and not key.endswith("conv_in.weight"):
        value = value.repeat_interleave(2, dim=1) / 2
    return value + noise * value.std() * torch.randn_like(value) if value.ndim == 4 else value


@torch.no_grad()
def grow(vae: AutoencoderKL, smaller: AutoencoderKL, noise: float = 0.1) -> None:
    """Start `vae` from an autoencoder of one level less and half the channels: it first decodes the same, enlarged.

    The new level is the outermost: the encoder's first block, the decoder's last one. Its residual branches start at
    zero, its upsampler as nearest-neighbour, and its shortcut joins the copies of each channel again.
    """
    ours = vae.state_dict()
    new = len(vae.decoder.up_blocks) - 1
    last = ("decoder.conv_norm_out", "decoder.conv_out")
    for key, value in smaller.state_dict().items():
        if key.startswith("encoder.down_blocks."):
            number, _, rest = key.removeprefix("encoder.down_blocks.").partition(".")
            target = f"encoder.down_blocks.{int(number) + 1}.{rest}"
        else:
            target = key
        value = value if key.startswith(last) else widened(key, value, noise)
        if target in ours and ours[target].shape == value.shape and not key.startswith("encoder.conv_in"):
            ours[target].copy_(value)
    for resnet in (*vae.decoder.up_blocks[new].resnets, *vae.encoder.down_blocks[0].resnets):
        nn.init.zeros_(resnet.conv2.weight)
        nn.init.zeros_(resnet.conv2.bias)
    shortcut = vae.decoder.up_blocks[new].resnets[0].conv_shortcut
    joins = torch.eye(shortcut.out_channels).repeat_interleave(2, dim=1) / 2
    shortcut.weight.copy_(joins[..., None, None])
    upsampler = vae.decoder.up_blocks[new - 1].upsamplers[0].conv
    nn.init.dirac_(upsampler.weight)
    for layer in (shortcut, upsampler):
        nn.init.zeros_(layer.bias)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels, across and down."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def sharpness_gap(out: torch.Tensor, images: torch.Tensor, patch: int = 8) -> torch.Tensor:
    """How differently sharp two batches of images (B, 3, H, W) are, patch by patch.

    The mean absolute difference of the standard deviations of their gradients within each patch: the gradient variance
    loss (Abrahamyan et al. 2022), of deviations instead of variances. A blurred edge costs here even where the squared
    error would rather have it so.
    """

    def deviation(differences: torch.Tensor) -> torch.Tensor:
        mean = F.avg_pool2d(differences, patch)
        return (F.avg_pool2d(differences.square(), patch) - mean.square()).clamp(min=1e-6).sqrt()

    return sum(F.l1_loss(deviation(a), deviation(b)) for a, b in zip(edges(out), edges(images), strict=True))


def halved(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 128, 128) at half the size, as the CLIPs and the anchor see them: the mean of 2 x 2 pixels."""
    return F.avg_pool2d(images, 2)


class Features:
    """What a CLIP's vision tower sees, for a loss that sees shapes (as LPIPS, Zhang et al. 2018).

    Its first layers tell where edges and textures are, its embedding what the image shows.
    """

    def __init__(self, folder: Path, device: str, layers: int = 2) -> None:
        model = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval().requires_grad_(False)
        self.layers = layers

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of images (B, 3, 64, 64) in -1..1: unit features (B, 65, width) of a layer, unit embeddings (B, D)."""
        out = self.model(images, output_hidden_states=True)
        return F.normalize(out.hidden_states[self.layers], dim=-1), F.normalize(out.image_embeds, dim=-1)

    def loss(self, out: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Mean squared distances, of the whole images at half the size, and of one crop of 64 px."""
        top, left = torch.randint(0, SIDE - CLIP_SIDE + 1, (2,)).tolist()
        window = (..., slice(top, top + CLIP_SIDE), slice(left, left + CLIP_SIDE))
        ours = self(torch.cat([halved(out), out[window]]))
        with torch.no_grad():
            theirs = self(torch.cat([halved(images), images[window]]))
        return sum((a - b).square().sum(dim=-1).mean() for a, b in zip(ours, theirs, strict=True))


Latents = Callable[[torch.Tensor], torch.Tensor]


class Learner(nn.Module):
    """The autoencoder and, while it learns, the discriminator; the frozen helpers are not among its weights."""

    def __init__(
        self, vae: AutoencoderKL, params: dict, anchor: Latents | None = None, features: Features | None = None
    ) -> None:
        """`anchor` gives, of images (B, 3, 128, 128), the latents (B, 4, 16, 16) that the encoder's mean shall be."""
        super().__init__()
        self.vae, self.discriminator = vae, Discriminator(params["discriminator"])
        self.params = params
        self.anchor, self.features = anchor, features

    def freeze_encoder(self) -> None:
        """Train the decoder alone: the latents stay what they are."""
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """All losses for images (B, 3, 128, 128) in -1..1."""
        params = self.params
        posterior = self.vae.encode(images).latent_dist
        out = self.vae.decode(posterior.sample()).sample.float()
        squared, kl = F.mse_loss(out, images), posterior.kl().mean()
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(out), edges(images), strict=True))
        rebuilt = squared + params["absolute"] * F.l1_loss(out, images) + params["edges"] * edge
        values = {"psnr": 10 * torch.log10(4 / squared.detach()), "kl": kl.detach(), "edge": edge.detach()}
        if params["sharpness"]:
            values["sharpness"] = sharpness_gap(out, images)
            rebuilt = rebuilt + params["sharpness"] * values["sharpness"]
        if self.features is not None and params["features"]:
            values["features"] = self.features.loss(out, images)
            rebuilt = rebuilt + params["features"] * values["features"]
        loss = rebuilt + params["kl_weight"] * kl
        if self.anchor is not None and params["anchor"]:
            with torch.no_grad():
                target = self.anchor(images)
            values["anchor"] = F.mse_loss(posterior.mean, target)
            loss = loss + params["anchor"] * values["anchor"]
        if params["adversarial"]:
            fool, tell = adversarial_terms(self.discriminator, out, images, rebuilt, params["noise"])
            values |= {"tell": tell}
            loss = loss + params["adversarial"] * fool + tell
        return {"loss": loss} | {name: value.detach() for name, value in values.items()}


# What the autoencoder learns, in order; a later phase changes some of the parameters of `vae`, in its own section.
PHASES = ("vae", "refined", "sharpened", "crisp")


def folders(work: Path) -> dict[str, Path]:
    """Phase -> where its checkpoint lies, in order."""
    return {phase: work / (phase if phase == PHASES[0] else f"vae-{phase}") for phase in PHASES}


def phase_params(phase: str) -> dict:
    """The parameters of a phase."""
    return load_params(PHASES[0]) | load_params(phase)


FIRST_EDITION = "fb519a52a45811be7b0588a5c8c17c152deac5d2"  # the last commit with the autoencoder of 64 px


def anchor_vae(work: Path) -> AutoencoderKL:
    """The autoencoder of 64 x 64 images whose latents are the anchor, frozen; read from git's history."""
    folder = work / "anchor"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            show = ["git", "show", f"{FIRST_EDITION}:data/base/vae/{name}"]
            (folder / name).write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
    return AutoencoderKL.from_pretrained(folder).float().eval().requires_grad_(False)


def main() -> None:
    """Train, or continue."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--device", default=load_params("device"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--phase", choices=PHASES, default=PHASES[0])
    parser.add_argument("--restart", action="store_true", help="Fresh optimizer and clock.")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    number = PHASES.index(arguments.phase)
    params = phase_params(arguments.phase)
    torch.manual_seed(params["seed"])
    packed = Sprites.load(arguments.work / "sprites")
    sprites = with_more_individuals(packed, dict.fromkeys(packed.pictures, params["hues"]))
    of = detailed_distribution(sprites) if number else world_distribution(sprites)
    features = Features(Path("data/clip"), arguments.device) if params["features"] else None
    learner = Learner(build(params), params, features=features)
    if number:
        before = last_checkpoint([folders(arguments.work)[phase] for phase in PHASES[:number]])
        learner.load_state_dict(torch.load(before, map_location="cpu", weights_only=True)["model"])
        earlier = copy.deepcopy(learner.vae).eval().requires_grad_(False)
    else:
        earlier = anchor_vae(arguments.work)
        grow(learner.vae, earlier)
    earlier = earlier.to(arguments.device, memory_format=torch.channels_last)
    learner.anchor = lambda images: earlier.encode(images if number else halved(images)).latent_dist.mean
    learner = learner.to(arguments.device, memory_format=torch.channels_last)
    if params["frozen_encoder"]:
        learner.freeze_encoder()

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        start = params["first_scene"] + step * params["batch"]
        scenes = [compose(sprites, of, "base", start + i) for i in range(params["batch"])]
        images = to_tensor([scene.image for scene in scenes])
        return learner(images.to(arguments.device, memory_format=torch.channels_last))

    fit(
        folders(arguments.work)[arguments.phase],
        learner,
        loss_at,
        minutes=arguments.minutes or params["minutes"],
        peak_lr=params["peak_lr"],
        muon=params["muon"],
        seed=params["seed"],
        device=arguments.device,
        restart=arguments.restart,
    )


if __name__ == "__main__":
    main()
