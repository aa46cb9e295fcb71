"""Base models of random weights in the published shapes: arithmetic and memory do not depend on what was learned."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "data/base/tokenizer"
VOCABULARY, LENGTH = 49408, 77  # CLIP's
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd14(divisor: int = 1) -> StableDiffusionPipeline:
    """Stable Diffusion 1.4, every width divided by `divisor`; layers, the UNet's heads' width, and lengths stay."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(width // divisor for width in (320, 640, 1280, 1280)),
        cross_attention_dim=768 // divisor,
        attention_head_dim=8 // divisor,  # the number of heads, by this class's old name
        norm_num_groups=32 // min(divisor, 2),
    )
    return StableDiffusionPipeline(
        vae=_vae(divisor, 512, scaling_factor=0.18215),
        text_encoder=_text_encoder(CLIPTextModel, 768 // divisor, 12, 12, "quick_gelu"),
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL base 1.0."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(1, 1024, scaling_factor=0.13025),
        text_encoder=_text_encoder(CLIPTextModel, 768, 12, 12, "quick_gelu"),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, 1280, 32, 20, "gelu", projection_dim=1280),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


# by name: how the model is made, and the dtype of its files
SHAPES = {
    "quarter": (lambda: sd14(4), torch.float32),
    "sd14": (sd14, torch.float32),
    "sdxl": (sdxl, torch.bfloat16),
}


def save(shape: str, folder: Path, device: str) -> None:
    """Write a model of `shape` with random weights, the same ones every time on one device, as a pipeline folder."""
    make, dtype = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        pipe = make()
    tokenizer = whole_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    pipe.register_modules(tokenizer=tokenizer)
    if "tokenizer_2" in pipe.components:
        pipe.register_modules(tokenizer_2=tokenizer)
    pipe.to(dtype).save_pretrained(folder)


def whole_tokenizer(folder: Path) -> CLIPTokenizer:
    """The embedded tokenizer with as many words as CLIP's, so that the token table has its real size.

    The words that are added have no merges, so no caption ever meets them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rules = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = rules["model"]["vocab"]
    vocabulary |= {f"unused-{number}</w>": number for number in range(len(vocabulary), VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": LENGTH}), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _vae(divisor: int, sample_size: int, scaling_factor: float) -> AutoencoderKL:
    widths = tuple(width // divisor for width in (128, 256, 512, 512))
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 // divisor,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def _text_encoder(kind: type, width: int, layers: int, heads: int, activation: str, **changes):
    words = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=LENGTH,
            hidden_act=activation,
            bos_token_id=words["<|startoftext|>"],
            eos_token_id=words["<|endoftext|>"],
            pad_token_id=words["<|pad|>"],
            **changes,
        )
    )
