"""What the world's models are graded by: a CLIP as judge, reconstruction, sharpness, distinct individuals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from world.catalogue import background_phrase, singular
from world.individuals import colour_word
from world.latents import load_clip
from world.scenes import BACKGROUNDS, CLIP_SIDE, to_tensor


class ClipEmbedder:
    """Normalized embeddings of captions and images by a CLIP."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.clip, self.tokenizer = clip.eval(), tokenizer

    @classmethod
    def trained(cls, work: Path, name: str) -> ClipEmbedder:
        """The CLIP as trained so far in the work folder."""
        return cls(*load_clip(work, name))

    @classmethod
    def shipped(cls, folder: Path) -> ClipEmbedder:
        """The CLIP of a folder that transformers loads."""
        return cls(CLIPModel.from_pretrained(folder, dtype=torch.float32), CLIPTokenizer.from_pretrained(folder))

    @torch.no_grad()
    def text(self, captions: list[str], batch: int = 1024) -> torch.Tensor:
        """Embeddings (N, D) of captions."""
        parts = []
        for i in range(0, len(captions), batch):
            tokens = self.tokenizer(captions[i : i + batch], padding=True, truncation=True, return_tensors="pt")
            parts.append(self.clip.text_projection(self.clip.text_model(tokens.input_ids).pooler_output))
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def image(self, images: list[np.ndarray]) -> torch.Tensor:
        """Embeddings (N, D) of uint8 images (H, W, 3), scaled down to 64 pixels."""
        parts = []
        for i in range(0, len(images), 128):
            pixels = to_tensor(images[i : i + 128], CLIP_SIDE)
            parts.append(self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output))
        return F.normalize(torch.cat(parts), dim=-1)


def caption_for(subject: str, background: str, kind: str = "a photo") -> str:
    """The plain caption of a graded image; `kind` may be "very small photo" or "close up photo"."""
    return f"{kind} of {singular(subject)} {background_phrase(background)}"


def retrieval(clip: ClipEmbedder, captions: list[str], images: list[np.ndarray]) -> dict[str, float]:
    """Share of captions whose own image is the nearest (R@1), or among the five nearest (R@5)."""
    similarity = clip.text(captions) @ clip.image(images).T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return {"R@1": (rank < 1).float().mean().item(), "R@5": (rank < 5).float().mean().item()}


def zero_shot(
    clip: ClipEmbedder,
    images: list[np.ndarray],
    facts: list[tuple[str, str]],
    subjects: tuple[str, ...],
    kind: str = "a photo",
) -> dict[str, float]:
    """Accuracy of naming the subject among all subjects, and the background (the subject given) among all of them."""
    seen = clip.image(images)
    names = clip.text([f"{kind} of {singular(s)}" for s in subjects])
    guesses = (seen @ names.T).argmax(dim=1)
    subject = np.mean([subjects[g] == s for g, (s, _) in zip(guesses, facts, strict=True)])
    places = {s: clip.text([caption_for(s, b, kind) for b in BACKGROUNDS]) for s in {s for s, _ in facts}}
    hits = [
        BACKGROUNDS[int((places[s] @ embedding).argmax())] == background
        for embedding, (s, background) in zip(seen, facts, strict=True)
    ]
    return {"subject": float(subject), "background": float(np.mean(hits))}


def company_caption(one: str, other: str, background: str) -> str:
    """The caption of two subjects in one image."""
    return f"a photo of {singular(one)} and {singular(other)} {background_phrase(background)}"


def halves(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right half of an image (S, S, 3) as squares: without top and bottom, widened at the edges."""
    side = len(image)
    high, wide = 2 * side // 3, side // 2
    rows = image[(side - high) // 2 : (side - high) // 2 + high]
    margin = ((0, 0), ((high - wide) // 2, high - wide - (high - wide) // 2), (0, 0))
    return np.pad(rows[:, :wide], margin, mode="edge"), np.pad(rows[:, side - wide :], margin, mode="edge")


def both_recognised(
    clip: ClipEmbedder, images: list[np.ndarray], facts: list[tuple[str, str, str]], subjects: tuple[str, ...]
) -> float:
    """Share of images of two subjects, side by side, in whose halves the judge names one and the other.

    Args:
        facts: (subject, other subject, background) of each image; which of them is left does not matter.
        subjects: what the judge may name.
    """
    names = clip.text([f"a photo of {singular(s)}" for s in subjects])
    parts = [half for image in images for half in halves(image)]
    guesses = [subjects[int(guess)] for guess in (clip.image(parts) @ names.T).argmax(dim=1)]
    named = zip(guesses[::2], guesses[1::2], strict=True)
    return float(np.mean([set(pair) == {one, other} for pair, (one, other, _) in zip(named, facts, strict=True)]))


@torch.no_grad()
def rebuilt(vae, images: list[np.ndarray], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, side, side) in -1..1 as the VAE of that side sees them, and as it gives them back."""
    x = to_tensor(images, side)
    return x, torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(32)]).clamp(-1, 1)


def autoencoded(vae, images: list[np.ndarray]) -> list[np.ndarray]:
    """Images (S, S, 3) uint8 as the VAE of that side gives them back."""
    _, out = rebuilt(vae, images, images[0].shape[0])
    return list((127.5 * (out.permute(0, 2, 3, 1) + 1) + 0.5).to(torch.uint8).numpy())


def psnr(x: torch.Tensor, out: torch.Tensor) -> float:
    """Mean over images (N, 3, H, W) in -1..1 of the peak signal-to-noise ratio in dB."""
    return float((10 * torch.log10(4 / (out - x).square().mean(dim=(1, 2, 3)))).mean())


def gradient_energy(x: torch.Tensor) -> float:
    """Mean squared difference of neighbouring pixels of images (N, 3, H, W): what blurring takes away."""
    return float((x[..., 1:] - x[..., :-1]).square().mean() + (x[..., 1:, :] - x[..., :-1, :]).square().mean())


def vae_figures(vae, images: list[np.ndarray], side: int) -> dict[str, float]:
    """Reconstruction of scenes (128 px): at the VAE's own side, and enlarged to the scenes' where that is larger."""
    x, out = rebuilt(vae, images, side)
    whole = to_tensor(images)
    enlarged = out
    if side != whole.shape[-1]:
        enlarged = F.interpolate(out, size=whole.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
    return {
        "psnr": psnr(x, out),
        "gradient_energy": gradient_energy(out) / gradient_energy(x),
        "psnr_at_128": psnr(whole, enlarged),
        "gradient_energy_at_128": gradient_energy(enlarged) / gradient_energy(whole),
    }


def colours_right(images: list[np.ndarray], colours: list[tuple[str, str]], threshold: float = 40) -> float:
    """Share of halves of images, left and right, whose subject on a white background has the colour asked for.

    Args:
        images: (H, W, 3) uint8.
        colours: for each image the names of the left and the right subject's colours.
    """
    found = []
    for image in images:
        half = image.shape[1] // 2
        opacity = np.where(np.abs(image.astype(np.float32) - 240).max(axis=-1) > threshold, 255, 0).astype(np.uint8)
        rgba = np.dstack([image, opacity])
        found.append([colour_word(Image.fromarray(part, "RGBA")) for part in (rgba[:, :half], rgba[:, half:])])
    return float(np.mean(np.array(found) == np.array(colours)))


def subject_colours(images: list[np.ndarray], threshold: float = 40) -> np.ndarray:
    """Mean colour (N, 3) of what differs from the border's median colour, for images on a plain background."""
    found = []
    for image in images:
        pixels = image.astype(np.float32)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        differs = np.abs(pixels - np.median(border, axis=0)).max(axis=-1) > threshold
        found.append(pixels[differs].mean(axis=0) if differs.any() else np.median(border, axis=0))
    return np.stack(found)


def distinct_colours(colours: np.ndarray, apart: float = 45, at_least: int = 2) -> int:
    """How many groups of colours (N, 3) in 0..255 there are: of those `apart` from all earlier groups' first member.

    Args:
        at_least: members that a group needs to count, so that one stray image is no individual.
    """
    firsts: list[np.ndarray] = []
    members: list[int] = []
    for colour in colours:
        distances = [float(np.linalg.norm(colour - first)) for first in firsts]
        if distances and min(distances) < apart:
            members[int(np.argmin(distances))] += 1
        else:
            firsts.append(colour)
            members.append(1)
    return sum(count >= at_least for count in members)
