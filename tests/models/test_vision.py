"""Features are the class tokens of transformers' own models; unsuitable models are refused in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import noisy_images
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from customdiff.errors import UserError
from customdiff.models.vision import VisionEncoder

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
VISION = SHAPE | {"intermediate_size": 32}
MODELS = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)),
    "dino": lambda: ViTModel(ViTConfig(**SHAPE, intermediate_size=32), add_pooling_layer=False),
    "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE, intermediate_size=32)),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "no class token": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, intermediate_size=32)),
}


def save(folder, kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["dinov2", "dino", "clip-vision", "clip"])
def test_a_feature_is_the_normalized_class_token(tmp_path, kind):
    model = save(tmp_path / "model", kind)
    images = [Image.open(path) for path in noisy_images(tmp_path / "images", 3)]
    found = VisionEncoder.load(tmp_path / "model")
    found.batch_size = 2
    pixels = CLIPImageProcessorPil.from_pretrained(tmp_path / "model")(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        whole = (model.vision_model if kind == "clip" else model)(pixel_values=pixels).last_hidden_state
    tokens = whole[:, 0].double().numpy()
    expected = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    np.testing.assert_allclose(found.images(images), expected, atol=1e-5)
    assert found.images([]).shape == (0, 16)


def test_an_image_of_another_mode_is_read_as_rgb(tmp_path):
    save(tmp_path, "dinov2")
    encoder = VisionEncoder.load(tmp_path)
    grey = Image.new("L", (40, 30), 90)
    np.testing.assert_array_equal(encoder.images([grey]), encoder.images([grey.convert("RGB")]))


def without_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if "layer" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def as_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_remote_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")


@pytest.mark.parametrize(
    ("kind", "damage", "named"),
    [
        ("dinov2", without_processor, "has no image processor"),
        ("dinov2", without_a_weight, "lacks 1 weights"),
        ("dinov2", as_a_pickle, "cannot be loaded"),
        ("dinov2", with_remote_code, "cannot be loaded"),
        ("dinov2", shutil.rmtree, "cannot be loaded"),
        ("no class token", lambda folder: None, "has no class token"),
    ],
)
def test_an_unsuitable_model_is_refused_in_one_line(tmp_path, kind, damage, named):
    folder = tmp_path / "model"
    save(folder, kind)
    damage(folder)
    with pytest.raises(UserError, match=named) as error:
        VisionEncoder.load(folder)
    assert str(error.value).startswith(f"evaluate.identity: {str(folder)!r}")
    assert "\n" not in str(error.value)
