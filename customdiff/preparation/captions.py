"""Captions of instance images: from sidecar files, from a captioner or from the template."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from customdiff.config import Concept, Prepare
from customdiff.errors import UserError
from customdiff.preparation.captioner import Captioner

PREFIX_TOKENS = 6  # room for the words that augmentation puts before a caption, such as "zoomed in"


@dataclass(frozen=True)
class Caption:
    """A caption with the modifier token.

    Attributes:
        origin: where its words come from.
        warnings: what was wrong with it and mended, for the user.
    """

    text: str
    origin: Literal["sidecar", "captioner", "template"]
    warnings: tuple[str, ...] = ()


def instance_captions(
    paths: Sequence[Path],
    concept: Concept,
    settings: Prepare,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Caption]:
    """Captions of a concept's instance images as `prepare.captions` says; each contains the modifier token.

    Args:
        tokenizer: the base model's; captions that are too long for it are cut at a word. None: any length.

    Raises:
        UserError: a sidecar file is wrong, or missing with `captions: sidecar`, or the captioner cannot be loaded.
    """
    captions = {} if settings.captions == "template" else _sidecars(paths, concept, settings.captions == "sidecar")
    rest = [path for path in paths if path not in captions]
    if rest and settings.captioning_model:
        captions |= _described(rest, concept, settings.captioning_model, device)
    template = Caption(concept.caption, "template")
    return [_fitted(captions.get(path, template), concept, tokenizer) for path in paths]


def with_token(description: str, concept: Concept) -> str:
    """Insert the modifier token before the class; if the class is missing, append the text to the instance prompt.

    `a cat on a sofa` becomes `a <new1> cat on a sofa`, and `an owl` becomes `a <new1> owl`, as in prompts. If the class
    is cat, `an animal` becomes `photo of a <new1> cat, an animal`.
    """
    words = description.split()
    class_words = concept.class_prompt.lower().split()
    for start in range(len(words) - len(class_words) + 1):
        candidate = [word.lower().strip(",.") for word in words[start : start + len(class_words)]]
        if candidate == class_words:
            before = words[:start]
            if before[-1:] == ["an"]:
                before[-1] = "a"
            return " ".join([*before, concept.modifier_token, *words[start:]])
    return f"{concept.caption}, {description}"


def sidecar_caption(path: Path, concept: Concept) -> str | None:
    """The caption in the .txt file beside an image, with {} replaced by the modifier token; None without a file.

    Raises:
        UserError: the file is not text, is empty, contains neither {} nor the token, or names another token.
    """
    sidecar = path.with_suffix(".txt")
    try:
        caption = " ".join(sidecar.read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{sidecar}: cannot be read as UTF-8 text ({error})") from error
    token = concept.modifier_token
    wanted = f"such as `{concept.instance_prompt} on the grass`"
    if not caption:
        raise UserError(f"{sidecar}: is empty; write a caption with {{}} for the subject, {wanted}, or delete the file")
    caption = caption.replace("{}", token)
    if token not in caption:
        raise UserError(f"{sidecar}: the caption must contain {{}} or {token}, {wanted}")
    if others := [word for word in re.findall(r"<[^\s<>]+>", caption) if word != token]:
        raise UserError(f"{sidecar}: names {others[0]}, but the token of this concept is {token}; write {{}} instead")
    return caption


def cut_to_tokens(text: str, tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """The longest start of a caption, in whole words, that leaves room for `PREFIX_TOKENS` in the text encoder.

    Args:
        token: the modifier token, which will be one token, but may not be in the tokenizer yet.
    """
    limit = tokenizer.model_max_length - 2 - PREFIX_TOKENS  # without start and end
    words = text.split()
    while len(words) > 1 and _length(words, tokenizer, token) > limit:
        words.pop()
    return " ".join(words).rstrip(",;")


def _length(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    text = " ".join(word.replace(token, "a") for word in words)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _sidecars(paths: Sequence[Path], concept: Concept, required: bool) -> dict[Path, Caption]:
    captions = {}
    for path in paths:
        text = sidecar_caption(path, concept)
        if text:
            captions[path] = Caption(text, "sidecar")
        elif required:
            raise UserError(
                f"prepare.captions: {path.name} has no caption file; add a .txt file beside it in the source, "
                "or use captions: auto"
            )
    return captions


def _described(paths: Sequence[Path], concept: Concept, captioner: str, device: torch.device) -> dict[Path, Caption]:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    described = Captioner(captioner, device).captions(images, concept.class_prompt)
    silent = Caption(concept.caption, "template", ("the captioner answered nothing",))
    return {
        path: Caption(with_token(text, concept), "captioner") if text else silent
        for path, text in zip(paths, described, strict=True)
    }


def _fitted(caption: Caption, concept: Concept, tokenizer: PreTrainedTokenizerBase | None) -> Caption:
    if tokenizer is None:
        return caption
    text = cut_to_tokens(caption.text, tokenizer, concept.modifier_token)
    if text == caption.text:
        return caption
    warning = f"the caption is too long for the text encoder and ends after {text[-30:]!r}"
    return replace(caption, text=text, warnings=(*caption.warnings, warning))
