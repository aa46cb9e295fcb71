"""Captions of instance and class images: from the template, from sidecar files, or from a captioner."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from customdiff.config import Concept, Prepare
from customdiff.errors import UserError


@dataclass(frozen=True)
class Caption:
    """A caption with the modifier token, and its origin: sidecar, template or blip."""

    text: str
    origin: str


def instance_captions(paths: list[Path], concept: Concept, settings: Prepare, device: torch.device) -> list[Caption]:
    """Captions of a concept's instance images by the method `prepare.captions`; each contains the modifier token.

    Raises:
        UserError: the method is sidecar and an image has no caption file, or the captioner cannot be loaded.
    """
    if settings.captions == "blip":
        described = describe(paths, settings.captioner, device)
        return [Caption(with_token(text, concept), "blip") for text in described]
    return [_caption(path, concept, settings.captions) for path in paths]


def _caption(path: Path, concept: Concept, kind: str) -> Caption:
    if kind == "sidecar" or (kind == "auto" and path.with_suffix(".txt").is_file()):
        return Caption(sidecar_caption(path, concept), "sidecar")
    return Caption(concept.caption, "template")


def with_token(description: str, concept: Concept) -> str:
    """Insert the modifier token before the class; if the class is missing, append the text to the instance prompt.

    `a cat on a sofa` becomes `a <new1> cat on a sofa`; `an animal` becomes `photo of a <new1> cat, an animal`.
    """
    words = description.split()
    class_words = concept.class_prompt.lower().split()
    for start in range(len(words) - len(class_words) + 1):
        candidate = [word.lower().strip(",.") for word in words[start : start + len(class_words)]]
        if candidate == class_words:
            return " ".join([*words[:start], concept.modifier_token, *words[start:]])
    return f"{concept.caption}, {description}"


def sidecar_caption(path: Path, concept: Concept) -> str:
    """The caption in the .txt file beside an image, with {} replaced by the modifier token.

    Raises:
        UserError: the file is missing, or its caption contains neither {} nor the token.
    """
    sidecar = path.with_suffix(".txt")
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(
            f"prepare.captions: {path.name} has no caption file; add a .txt file beside it in the source, "
            "or use captions: template"
        ) from error
    caption = caption.replace("{}", concept.modifier_token)
    if concept.modifier_token not in caption:
        raise UserError(f"{sidecar}: the caption must contain {{}} or {concept.modifier_token}")
    return caption


def describe(paths: list[Path], captioner: str, device: torch.device) -> list[str]:
    """Captions of images by a BLIP model.

    Args:
        captioner: folder or Hub repository.

    Raises:
        UserError: the model cannot be loaded.
    """
    from transformers import AutoProcessor, BlipForConditionalGeneration

    try:
        processor = AutoProcessor.from_pretrained(captioner)
        model = BlipForConditionalGeneration.from_pretrained(captioner, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"prepare.captioner: {captioner} cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
    captions = []
    for path in tqdm(paths, desc="captions", unit="image"):
        with Image.open(path) as image, torch.inference_mode():
            inputs = processor(images=image.convert("RGB"), return_tensors="pt").to(device)
            ids = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        captions.append(processor.decode(ids[0], skip_special_tokens=True).strip())
    return captions
