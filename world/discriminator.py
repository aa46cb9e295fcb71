"""A patch discriminator (Isola et al. 2017) with the hinge loss, for the last part of the autoencoder's training."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


class Discriminator(nn.Module):
    """Three convolutions, two of them strided: one logit per 4 x 4 pixels, each seeing 18 x 18 of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 1),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H/4, W/4), high where images (B, 3, H, W) look real."""
        return self.layers(images)


def detail(images: torch.Tensor, noise: float) -> torch.Tensor:
    """What the discriminator sees of images (B, 3, H, W): their difference from the mean of 9 x 9 pixels, and noise.

    It would else tell real from rebuilt by the slightest cast, win, and turn white cream and black blue (seen here).
    The noise, whose standard deviation is `noise`, keeps it from winning by what no eye sees.
    """
    blurred = F.avg_pool2d(images, 9, stride=1, padding=4, count_include_pad=False)
    return images - blurred + noise * torch.randn_like(images)


def adversarial_terms(
    discriminator: Discriminator, out: torch.Tensor, images: torch.Tensor, rebuilt: torch.Tensor, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder and what the discriminator descend, to be added up: neither moves the other's weights.

    The decoder's term is scaled so that its gradient at `out` is as long as that of `rebuilt`, the reconstruction loss
    (Esser et al. 2021, equation 7, measured at the images instead of the last layer).

    Returns:
        fool: a scalar with the gradient, not the value, of the scaled decoder's term.
        tell: the discriminator's hinge loss.
    """
    leaf = out.detach().requires_grad_(True)
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    logits = functional_call(discriminator, frozen, (detail(leaf, noise),))
    (adversarial,) = torch.autograd.grad(-logits.mean(), leaf)
    (reconstruction,) = torch.autograd.grad(rebuilt, out, retain_graph=True)
    scale = reconstruction.norm() / (adversarial.norm() + 1e-12)
    fool = (out * (scale * adversarial)).sum()
    tell = F.relu(1 - discriminator(detail(images, noise))).mean()
    tell = tell + F.relu(1 + discriminator(detail(out.detach(), noise))).mean()
    return fool, tell
