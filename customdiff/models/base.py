"""Loading of base models from safetensors, from a folder or the Hub, and checks that Custom Diffusion supports them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models.text import text_encoders

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def quiet() -> None:
    """Silence log messages and progress bars of the model libraries; our own errors name the cause."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def device(name: str = "auto") -> torch.device:
    """The device for a value of `base.device`; `auto` is the GPU if there is one, else the CPU.

    Raises:
        UserError: this machine does not have the device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    chosen = torch.device(name)
    if chosen.type != "cpu" and (accelerator is None or accelerator.type != chosen.type):
        raise UserError(f"base.device: this machine has no {name}; use auto or cpu")
    return chosen


def load_pipeline(
    base: Base, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **parts: Any
) -> DiffusionPipeline:
    """Load the base model as a diffusers pipeline, in eval mode, from safetensors files only.

    Args:
        base: folder or Hub repository, revision and variant.
        dtype: dtype of all weights.
        device: device of all weights.
        parts: replacements for components of the model; `vae=None` does not load the VAE.

    Raises:
        UserError: the model cannot be found or read, or Custom Diffusion does not support it.
    """
    # The safety checker is a separate network of 600 M parameters that no stage uses.
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
        _own_memory(part)
    return pipe


def _own_memory(part: torch.nn.Module) -> None:
    """Copy weights out of the mapped file, those of convolutions to channels_last.

    Loaded weights are views of the memory-mapped file; a single remaining view would keep the whole file in memory.
    With channels_last, image generation takes three quarters of the time.
    """
    for weight in part.parameters():
        memory_format = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        weight.data = weight.data.clone(memory_format=memory_format)


def load_part(
    base: Base, name: str, model_class: type[ModelMixin], *, device: torch.device | str = "cpu"
) -> ModelMixin:
    """Load one network of the base model, such as its VAE, frozen, in fp32 and in eval mode.

    Raises:
        UserError: the model cannot be found or read.
    """
    quiet()
    with _loading(base):
        part = model_class.from_pretrained(
            base.model, subfolder=name, revision=base.revision, variant=base.variant, use_safetensors=True
        )
    return part.to(device, torch.float32).eval().requires_grad_(False)


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model's (first) text encoder, without modifier tokens.

    Raises:
        UserError: the model cannot be found or read.
    """
    quiet()
    with _loading(base):
        return AutoTokenizer.from_pretrained(base.model, subfolder="tokenizer", revision=base.revision)


@contextmanager
def _loading(base: Base) -> Iterator[None]:
    if Path(base.model).exists() and not Path(base.model).is_dir():
        raise UserError(f"base.model: {base.model} is not a folder")
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model: {base.model} cannot be loaded as a diffusers pipeline with safetensors weights ({reason})"
        ) from error


def family(pipe: DiffusionPipeline) -> str:
    """The model family, detected from the components: `Stable Diffusion 1.x`, `2.x` or `XL`.

    No code depends on the difference between 1.x and 2.x. For display, the width of the text states tells them apart.
    """
    if len(text_encoders(pipe)) == 2:
        return "Stable Diffusion XL"
    return f"Stable Diffusion {'2.x' if pipe.unet.config.cross_attention_dim == 1024 else '1.x'}"


def check_family(pipe: DiffusionPipeline) -> None:
    """Reject pipelines other than text-to-image with a UNet that has cross-attention to a text encoder.

    Raises:
        UserError: the components are those of another kind of model.
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
            f"base.model: its UNet has {unet.config.in_channels} input and {unet.config.out_channels} output channels, "
            "as for inpainting or editing; use the text-to-image model that it was derived from"
        )
