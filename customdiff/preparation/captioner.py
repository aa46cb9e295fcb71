"""Captioners: image-to-text models of transformers that describe photos, told the class of the subject."""

from collections.abc import Sequence

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from customdiff.errors import UserError

INSTRUCTION = (
    "Write one short caption of this photo. Begin with 'photo of a {}'. Then say where the {} is, what is around it, "
    "what it does, the light and the framing. Do not say what the {} itself looks like: leave out its color, pattern, "
    "material and breed. Answer with the caption only."
)
CONTINUING = ("blip", "git")  # model types that continue a caption from its first words
FLORENCE_TASK = "<CAPTION>"  # Xiao et al. 2024: a task token instead of an instruction
MAX_NEW_TOKENS = 60


class Captioner:
    """A frozen image-to-text model: fp32 on the CPU, its own dtype on a GPU."""

    def __init__(self, name: str, device: torch.device, *, key: str = "prepare.captioner") -> None:
        """Load from a folder or a Hub repository: safetensors only, no remote code.

        Args:
            key: the key of params.yaml that names the model, for error messages.

        Raises:
            UserError: nothing there can be loaded as a complete image-to-text model.
        """
        self.name, self.device = name, device
        try:
            self.model_type = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
            model, loading = AutoModelForImageTextToText.from_pretrained(
                name,
                dtype=torch.float32 if device.type == "cpu" else "auto",
                use_safetensors=True,
                output_loading_info=True,
            )
            # the PIL backend: captions then do not depend on torchvision being installed
            self.processor = AutoProcessor.from_pretrained(name, backend="pil")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise UserError(
                f"{key}: no captioner can be loaded from {name!r}; give a folder or a Hub repository of an "
                "image-to-text model in safetensors, such as Salesforce/blip-image-captioning-base, add a .txt file "
                f"beside each photo, or set prepare.captions: template ({' '.join(str(error).split())[:200]})"
            ) from error
        if loading["missing_keys"]:  # transformers would fill them at random
            raise UserError(f"{key}: {name!r} lacks weights, such as {sorted(loading['missing_keys'])[0]}")
        self.model = model.to(device).eval().requires_grad_(False)

    def captions(self, images: Sequence[Image.Image], class_prompt: str) -> list[str]:
        """One caption for each RGB image, on one line; empty where the model answers nothing.

        A model with a chat template gets `INSTRUCTION`. BLIP and GIT continue `photo of a <class>`. Others caption
        the image without knowing the class.
        """
        return [
            one_sentence(self._describe(image, class_prompt))
            for image in tqdm(images, desc="captions", unit="photo", disable=None)
        ]

    def _describe(self, image: Image.Image, class_prompt: str) -> str:
        inputs = self._inputs(image, class_prompt).to(self.device, dtype=self.model.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        if self._is_chat:  # the answer follows the question
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(ids[0], skip_special_tokens=True)

    @property
    def _is_chat(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None))

    def _inputs(self, image: Image.Image, class_prompt: str):
        if self._is_chat:
            question = {"type": "text", "text": INSTRUCTION.format(*[class_prompt] * 3)}
            message = {"role": "user", "content": [{"type": "image", "image": image}, question]}
            return self.processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        if self.model_type == "florence2":
            return self.processor(images=image, text=FLORENCE_TASK, return_tensors="pt")
        if self.model_type not in CONTINUING:
            return self.processor(images=image, return_tensors="pt")
        inputs = self.processor(images=image, text=first_words(class_prompt), return_tensors="pt")
        if self.model_type == "git":  # BLIP's generate drops the end token itself
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        return inputs


def first_words(class_prompt: str) -> str:
    """The start of a caption: `photo of a cat`, `photo of an owl`."""
    return f"photo of {'an' if class_prompt[0].lower() in 'aeiou' else 'a'} {class_prompt}"


def one_sentence(text: str) -> str:
    """The first sentence of a model's answer, without quotes and the final period."""
    words = " ".join(text.split()).strip(" \"'`")
    sentence, _, _ = words.partition(". ")
    return sentence.strip(" \"'`.")
