"""The base model: its parts, wherever they lie, loaded without pickle and refused in one line where they do not fit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.files import sha256
from customdiff.models.text import text_encoders

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quiet() -> None:
    """Keep the model libraries' notices off the screen: a user meets our one line instead."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def device(name: str = "auto") -> torch.device:
    """The device that `base.device` names; `auto` is a GPU where there is one, else the CPU.

    Raises:
        UserError: the named device is not on this machine.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    wanted = torch.device(name)
    if wanted.type != "cpu" and (found is None or found.type != wanted.type):
        raise UserError(f"base.device: {name} is not on this machine; auto or cpu will run")
    return wanted


def load_pipeline(
    base: Base, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **parts: Any
) -> DiffusionPipeline:
    """Load the base model as a diffusers pipeline, in eval mode, on `device`, from safetensors alone.

    Args:
        base: folder or Hub repository, revision and variant.
        dtype: of all weights.
        parts: components to put in place of the model's own; `vae=None` leaves the VAE out.

    Raises:
        UserError: the model cannot be found or read, or is not one that Custom Diffusion can be put into.
    """
    # The safety checker judges pictures of the open web; it is a second network of 600 M params and not ours to run.
    parts = {"safety_checker": None, "requires_safety_checker": False} | parts
    quiet()
    with _loading(base):
        config = DiffusionPipeline.load_config(base.model, revision=base.revision)
        known = {name: part for name, part in parts.items() if name in config}
        pipe = DiffusionPipeline.from_pretrained(
            base.model,
            revision=base.revision,
            variant=base.variant,
            dtype=dtype,
            use_safetensors=True,
            **known,
        )
    check_family(pipe)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in filter(None, (pipe.unet, pipe.components.get("vae"))):
        _settle(part)
    return pipe


def _settle(part: torch.nn.Module) -> None:
    """Give weights memory of their own, convolutions in channels_last: drawing then takes three quarters of the time.

    Weights as they were read lie in the file, mapped as a whole; a single one left there keeps all of it in memory.
    """
    for weight in part.parameters():
        form = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weight.data = weight.data.clone(memory_format=form)


def load_part(base: Base, name: str, kind: type, *, device: torch.device | str = "cpu") -> torch.nn.Module:
    """Load one network of the base model, such as its VAE, frozen, in fp32 and in eval mode.

    Raises:
        UserError: the model cannot be found or read.
    """
    quiet()
    with _loading(base):
        part = kind.from_pretrained(
            base.model, subfolder=name, revision=base.revision, variant=base.variant, use_safetensors=True
        )
    return part.to(device, torch.float32).eval().requires_grad_(False)


def weight_hashes(base: Base) -> dict[str, str]:
    """SHA-256 of each weights file of a base model in a folder, by its place there; empty where it is on the Hub."""
    paths = sorted(Path(base.model).glob("*/*.safetensors"))
    return {f"{path.parent.name}/{path.name}": sha256(path) for path in paths}


@contextmanager
def _loading(base: Base) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model: {base.model} cannot be loaded as a diffusers pipeline with safetensors weights ({reason})"
        ) from error


def family(pipe: DiffusionPipeline) -> str:
    """What the pipeline's parts show it to be, never its name: `Stable Diffusion 1.x`, `2.x` or `XL`.

    1.x and 2.x differ in nothing that the code asks for; the width of the text states tells them apart for readers.
    """
    if len(text_encoders(pipe)) == 2:
        return "Stable Diffusion XL"
    return f"Stable Diffusion {'2.x' if pipe.unet.config.cross_attention_dim == 1024 else '1.x'}"


def check_family(pipe: DiffusionPipeline) -> None:
    """Refuse, in one line, a pipeline that is not text to image by a UNet with cross-attention to CLIP text encoders.

    Raises:
        UserError: the pipeline's parts, not its name, show another family.
    """
    unet = pipe.components.get("unet")
    has_text = unet is not None and pipe.components.get("text_encoder") is not None
    if not has_text or not any("attn2" in name for name in unet.attn_processors):
        raise UserError(
            f"base.model: {type(pipe).__name__} has no UNet with cross-attention to a text encoder; "
            "use a Stable Diffusion 1.x, 2.x or XL base model"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise UserError(
            f"base.model: its UNet takes {unet.config.in_channels} channels and gives {unet.config.out_channels}, as "
            "for inpainting or editing; use the text-to-image model that it was made from"
        )
