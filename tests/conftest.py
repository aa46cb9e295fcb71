"""Small models of the real shapes, made on the spot: random weights suffice wherever arithmetic is what is tested."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.config import Params
from customdiff.models import base, methods, modifier_tokens
from customdiff.models.text import text_encoders
from customdiff.preparation import prepare, prepared_set
from customdiff.preparation.examples import Example

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["photo", "of", "a", "the", "cat", "dog", "pot", "wooden", "very", "small", "far", "away", "on", "red", "grass"]


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which letters and the words above are tokens."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [f"{word}</w>" for word in WORDS]
    merges, pieces = [], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    tokens = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocabulary = list(dict.fromkeys([*tokens, *pieces, *words]))
    # An end token with id 2 would switch transformers to a legacy pooling rule.
    vocabulary[2], vocabulary[3] = vocabulary[3], vocabulary[2]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token="<|pad|>",
        unk_token="<|endoftext|>",
        model_max_length=16,
    )


def tiny_text_encoder(tokenizer: CLIPTokenizer, width: int, kind: type = CLIPTextModel, **changes):
    """A CLIP text encoder of random weights."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return kind(CLIPTextConfig(**shape | changes))


def tiny_vae() -> AutoencoderKL:
    """An autoencoder of random weights: 32 px, a factor of 4."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.7,
        force_upcast=False,
    )


def tiny_unet(**changes) -> UNet2DConditionModel:
    """A UNet of random weights: two levels of cross-attention."""
    shape = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**shape | changes)


# Stable Diffusion's noise schedule, as every model of the family has it
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_pipeline(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x of random weights."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(folder / "source-tokenizer")
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        tiny_vae(),
        tiny_text_encoder(tokenizer, 32),
        tokenizer,
        tiny_unet(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def tiny_v_pipeline(folder: Path, seed: int = 1) -> StableDiffusionPipeline:
    """A Stable Diffusion 2.x: v-prediction, OpenCLIP's activation, linear projections, heads that grow with width."""
    pipe = tiny_pipeline(folder, seed)
    pipe.register_modules(
        text_encoder=tiny_text_encoder(pipe.tokenizer, 48, hidden_act="gelu"),
        unet=tiny_unet(cross_attention_dim=48, use_linear_projection=True, attention_head_dim=[2, 4]),
        scheduler=DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction"),
    )
    return pipe


def tiny_xl_pipeline(folder: Path, seed: int = 2) -> StableDiffusionXLPipeline:
    """An SDXL: two text encoders and tokenizers, pooled embeddings, size and crop conditioning, Euler's scheduler."""
    torch.manual_seed(seed)
    first, second = (tiny_tokenizer(folder / f"source-tokenizer-{number}") for number in (1, 2))
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(first, 32),
        text_encoder_2=tiny_text_encoder(second, 40, CLIPTextModelWithProjection, projection_dim=24),
        tokenizer=first,
        tokenizer_2=second,
        unet=tiny_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            cross_attention_dim=72,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of a random epsilon-predicting Stable Diffusion 1.x."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v_base(tmp_path_factory) -> Path:
    """Folder of a random v-predicting Stable Diffusion 2.x."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-v"
    tiny_v_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_xl_base(tmp_path_factory) -> Path:
    """Folder of a random SDXL."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-xl"
    tiny_xl_pipeline(folder).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps its precision and device for the whole process; each test begins without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def concept_values(token: str = "<new1>", name: str = "cat") -> dict:
    """A concept's section of params.yaml."""
    return {
        "source": {"path": f"data/concepts/{name}"},
        "modifier_token": token,
        "class_prompt": name,
        "instance_prompt": f"photo of a {{}} {name}",
    }


def tiny_params(base: Path, *, concepts: dict | None = None, prepare: dict | None = None, **train) -> Params:
    """Parameters of a run on a tiny base that takes seconds."""
    return Params.model_validate(
        {
            "base": {"model": str(base), "device": "cpu"},
            "concepts": concepts or {"cat": concept_values()},
            "prepare": {"resolution": 32, "views": 4, "captioner": None} | (prepare or {}),
            "train": {"max_steps": 6, "learning_rate": 1e-3, "checkpointing_steps": 2} | train,
        }
    )


def write_prepared(folder: Path, params: Params) -> Path:
    """Prepared sets of four noisy instance images and six class images for each concept; returns `folder`."""
    vae = base.load_part(params.base, "vae", AutoencoderKL)
    for number, (name, concept) in enumerate(params.concepts.items()):
        images = noisy_images(folder.with_name(f"{folder.name}-images") / name, 10, seed=number)
        (folder / name).mkdir(parents=True)
        for kind, paths, captions, prepare_images in (
            ("instance", images[:4], [concept.caption] * 4, prepare.prepare_instances),
            ("class", images[4:], [f"a {concept.class_prompt} on red", "the grass"] * 3, prepare.prepare_classes),
        ):
            examples = [Example(*pair) for pair in zip(paths, captions, strict=True)]
            seed = prepare.seed_of(params.base.seed, name, kind)
            prepared_set.save(prepare_images(examples, params.prepare, vae, seed), folder / name / kind)
    return folder


def noisy_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """PNG files of random pixels, 50 x 40."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def random_adapter(
    model_folder: Path,
    out: Path,
    *,
    concepts: dict | None = None,
    method: str = "custom_diffusion",
    freeze_model: str = "crossattn_kv",
    lora_rank: int = 2,
    seed: int = 0,
) -> Path:
    """Save an adapter of random weights and embeddings, large enough to change every image; returns `out`.

    Args:
        model_folder: the base model.
        concepts: by name, as in params.yaml; None: one cat under <new1>.
    """
    concepts = concepts or {"cat": concept_values()}
    params = tiny_params(model_folder, concepts=concepts, method=method, freeze_model=freeze_model, lora_rank=lora_rank)
    pipe = base.load_pipeline(params.base)
    torch.manual_seed(seed)
    widths = {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}
    tokens = [concept.modifier_token for concept in params.concepts.values()]
    embeddings = {token: {name: torch.randn(width) for name, width in widths.items()} for token in tokens}
    modifier_tokens.add_tokens(pipe, embeddings)
    with torch.no_grad():
        for weight in methods.inject(pipe.unet, params.train).values():
            weight += 0.3 * torch.randn_like(weight)
    trained = params.train.model_dump(include={"method", "freeze_model", "lora_rank"})
    config = AdapterConfig.model_validate({"base": params.base.model_dump(), "concepts": concepts, **trained})
    adapter.save(adapter.from_pipeline(pipe, config), out)
    return out
