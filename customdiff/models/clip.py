"""CLIP embeddings: texts and images as unit vectors of one space."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from customdiff.errors import UserError

try:  # the processor for PIL images, so that results do not depend on whether torchvision is installed
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:  # before transformers 5.4 this is the only class
    from transformers import CLIPImageProcessor


class Clip:
    """A frozen CLIP model (Radford et al. 2021) in fp32. Embeddings have norm 1, so cosines are dot products."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: CLIPImageProcessor,
        batch_size: int = 32,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, name_or_path: str | Path, device: str | torch.device = "cpu", *, key: str = "evaluate.clip"
    ) -> "Clip":
        """Load a CLIP model, its tokenizer and its image processor, from safetensors files only, in fp32.

        Args:
            name_or_path: folder or Hub repository.
            device: device of the model.
            key: key of params.yaml that names the model, for error messages.

        Raises:
            UserError: no complete CLIP model can be loaded.
        """
        name = str(name_or_path)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            model, loading = CLIPModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
            processor = CLIPImageProcessor.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{key}: {name!r} cannot be loaded; use a folder or Hub repository with a CLIPModel in safetensors, "
                f"its tokenizer and its image processor ({reason})"
            ) from error
        if loading["missing_keys"]:  # transformers initializes them at random
            raise UserError(
                f"{key}: {name!r} lacks {len(loading['missing_keys'])} weights of a CLIPModel, such as "
                f"{sorted(loading['missing_keys'])[0]}; use a complete CLIP model with text and vision encoders"
            )
        return cls(model.to(device), tokenizer, processor)

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, truncated to the model's length: (N, D) float32, each of norm 1."""
        length = self.model.config.text_config.max_position_embeddings
        embeddings = []
        for batch in _batches(texts, self.batch_size):
            tokens = self.tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            )
            pooled = self.model.text_model(
                input_ids=tokens.input_ids.to(self.model.device),
                attention_mask=tokens.attention_mask.to(self.model.device),
            ).pooler_output
            embeddings.append(self.model.text_projection(pooled))
        return self._unit(embeddings)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Embeddings of images of any size and mode: (N, D) float32, each of norm 1."""
        embeddings = []
        for batch in _batches(images, self.batch_size):
            pixels = self.processor(images=[image.convert("RGB") for image in batch], return_tensors="pt")
            pooled = self.model.vision_model(pixel_values=pixels.pixel_values.to(self.model.device)).pooler_output
            embeddings.append(self.model.visual_projection(pooled))
        return self._unit(embeddings)

    def _unit(self, embeddings: list[torch.Tensor]) -> np.ndarray:
        if not embeddings:
            return np.zeros((0, self.model.config.projection_dim), np.float32)
        return torch.nn.functional.normalize(torch.cat(embeddings), dim=-1).cpu().numpy()


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
