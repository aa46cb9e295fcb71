"""Subject masks by a segmentation model of transformers: CLIPSeg, told the class, or semantic segmentation."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    CLIPSegForImageSegmentation,
)

from customdiff.errors import UserError

CLIPSEG_THRESHOLD = 0.3  # of the sigmoid; not tuned, and never run with the released weights here


class Segmenter:
    """A frozen segmentation model in fp32 that marks one class in images."""

    def __init__(self, name: str, device: torch.device, *, key: str = "prepare.segmenter") -> None:
        """Load from a folder or a Hub repository: safetensors only, no remote code.

        Args:
            key: the key of params.yaml that names the model, for the messages of errors.

        Raises:
            UserError: nothing there can be loaded as a whole segmentation model.
        """
        self.name, self.key, self.device = name, key, device
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            self.is_prompted = config.model_type == "clipseg"
            kind = CLIPSegForImageSegmentation if self.is_prompted else AutoModelForSemanticSegmentation
            model, loading = kind.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            # the PIL backend: masks then do not depend on torchvision being installed
            processor = AutoProcessor if self.is_prompted else AutoImageProcessor
            self.processor = processor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise UserError(
                f"{key}: no segmentation model can be loaded from {name!r}; give a folder or a Hub repository of "
                f"CLIPSeg or of semantic segmentation in safetensors, add a .mask.png beside each photo, or set "
                f"prepare.masks: none ({' '.join(str(error).split())[:200]})"
            ) from error
        if loading["missing_keys"]:  # transformers would fill them at random
            raise UserError(f"{key}: {name!r} lacks weights, such as {sorted(loading['missing_keys'])[0]}")
        self.model = model.to(device).eval().requires_grad_(False)

    def masks(self, images: Iterable[Image.Image], class_prompt: str) -> Iterator[np.ndarray]:
        """For each RGB image its mask (H, W) float32: 1 where the class is, 0 elsewhere.

        Raises:
            UserError: the model has labels, but neither one for the class nor a background.
        """
        labels = None if self.is_prompted else self._labels(class_prompt)
        for image in images:
            with torch.inference_mode():
                score = self._class_score(image, class_prompt) if labels is None else self._label_score(image, labels)
            size = (image.height, image.width)
            upsampled = F.interpolate(score[None, None].cpu(), size=size, mode="bilinear", align_corners=False)
            yield (upsampled[0, 0] > 0).float().numpy()

    def _class_score(self, image: Image.Image, class_prompt: str) -> Tensor:
        """CLIPSeg's log odds (h, w) for the class, 0 at the threshold."""
        inputs = self.processor(text=[class_prompt], images=[image], return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits
        return logits.reshape(logits.shape[-2:]).float() - float(np.log(CLIPSEG_THRESHOLD / (1 - CLIPSEG_THRESHOLD)))

    def _label_score(self, image: Image.Image, labels: list[int]) -> Tensor:
        """Best logit of the labels less the best of the others, (h, w): above 0 where one of the labels wins."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits[0].float()
        others = [index for index in range(len(logits)) if index not in labels]
        return logits[labels].amax(0) - logits[others].amax(0)

    def _labels(self, class_prompt: str) -> list[int]:
        """Labels that name the class (`cat`, or `cat, tabby`), else all but the background."""
        names = {int(i): {part.strip().lower() for part in n.split(",")} for i, n in self.model.config.id2label.items()}
        words = class_prompt.lower()
        if named := [index for index, parts in names.items() if words in parts]:
            return named
        others = [index for index, parts in names.items() if "background" not in parts]
        if len(others) == len(names):
            raise UserError(
                f"{self.key}: {self.name!r} has no label for {class_prompt!r} and none for the background; use a model "
                "that is told the class, such as CIDAS/clipseg-rd64-refined"
            )
        return others
