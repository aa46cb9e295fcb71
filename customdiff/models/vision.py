"""Image features of self-supervised vision models, such as DINO and DINOv2: how similar two pictures' subjects are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from customdiff.errors import UserError

CLASS_TOKENS = ("cls_token", "class_embedding")  # ends of the names of a class token's weights
UNUSED = ("pooler.", "text_model.", "text_projection.")  # weights that the class token does not depend on


class VisionEncoder:
    """A frozen vision transformer in fp32. A feature is the class token of its last layer, with norm 1."""

    def __init__(self, model: torch.nn.Module, processor, batch_size: int = 32) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def load(
        cls, name_or_path: str | Path, device: str | torch.device = "cpu", *, key: str = "evaluate.identity"
    ) -> "VisionEncoder":
        """Load a vision transformer and its image processor: safetensors only, no remote code, in fp32.

        Of a CLIP model only the image encoder is used.

        Args:
            name_or_path: folder or Hub repository.
            device: device of the model.
            key: key of params.yaml that names the model, for error messages.

        Raises:
            UserError: no complete model with a class token and an image processor can be loaded.
        """
        name = str(name_or_path)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        wanted = "use a folder or Hub repository of a vision transformer such as facebook/dinov2-base"
        try:
            model, loading = AutoModel.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{key}: {name!r} cannot be loaded; {wanted}, in safetensors ({reason})") from error
        try:
            # the PIL backend: features then do not depend on torchvision being installed
            processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"{key}: {name!r} has no image processor (preprocessor_config.json); {wanted}") from error
        if missing := sorted(each for each in loading["missing_keys"] if not each.startswith(UNUSED)):
            raise UserError(  # transformers initializes them at random
                f"{key}: {name!r} lacks {len(missing)} weights of its model, such as {missing[0]}; use a complete model"
            )
        model = getattr(model, "vision_model", model)  # of CLIP and its like
        if not any(each.endswith(CLASS_TOKENS) for each, _ in model.named_parameters()):
            raise UserError(f"{key}: {name!r} has no class token; {wanted}")
        return cls(model.to(device), processor)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features of images of any size and mode: (N, D) float32, each of norm 1."""
        config: Any = self.model.config
        features = [np.zeros((0, config.hidden_size), np.float32)]
        device = next(self.model.parameters()).device
        for start in range(0, len(images), self.batch_size):
            batch = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            pixels = self.processor(images=batch, return_tensors="pt").pixel_values.to(device)
            tokens = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            features.append(F.normalize(tokens, dim=-1).cpu().numpy())
        return np.concatenate(features)
