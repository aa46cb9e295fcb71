"""The base model: its parts, wherever they lie, loaded without pickle and refused in one line where they do not fit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from customdiff.errors import UserError
from customdiff.params import Base

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
    for part in filter(None, (pipe.unet, pipe.components.get("vae"))):
        part.to(memory_format=torch.channels_last)  # drawing then takes about three quarters of the time on a CPU
    return pipe.to(device)


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


@contextmanager
def _loading(base: Base) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model: {base.model} cannot be loaded as a diffusers pipeline with safetensors weights ({reason})"
        ) from error


def check_family(pipe: DiffusionPipeline) -> None:
    """Refuse, in one line, a pipeline without a cross-attention UNet and one CLIP text encoder.

    Raises:
        UserError: the pipeline's parts, not its name, show another family.
    """
    parts = pipe.components
    if parts.get("text_encoder_2") is not None:
        raise UserError(
            "base.model: has two text encoders (SDXL); Stable Diffusion 1.x and 2.x can be personalized so far"
        )
    unet = parts.get("unet")
    if unet is None or parts.get("text_encoder") is None or not any("attn2" in name for name in unet.attn_processors):
        raise UserError(
            f"base.model: {type(pipe).__name__} has no UNet with cross-attention to a text encoder; "
            "use a Stable Diffusion 1.x or 2.x model"
        )


def text_states(tokenizer: Any, text_encoder: torch.nn.Module, captions: list[str]) -> torch.Tensor:
    """Hidden states of captions, padded to the tokenizer's length, as the UNet reads them: (N, L, D).

    Gradients flow to whatever trains in `text_encoder`. A caption too long for the tokenizer is cut at its end.
    """
    ids = token_ids(tokenizer, captions).to(text_encoder.device)
    return text_encoder(ids)[0]


def token_ids(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token ids of captions, padded and cut to the tokenizer's length: (N, L) int64."""
    return tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
