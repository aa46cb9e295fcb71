"""The base model is loaded without pickle, and what cannot be personalized is refused by its parts."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models import base
from customdiff.models.text import text_of


def test_a_pipeline_is_loaded_whole_or_without_its_vae(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)), dtype=torch.float16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16
    assert not pipe.unet.training
    assert base.load_pipeline(Base(model=str(tiny_base)), vae=None).vae is None


def test_a_part_is_frozen(tiny_base):
    vae = base.load_part(Base(model=str(tiny_base)), "vae", AutoencoderKL)
    assert not any(weight.requires_grad for weight in vae.parameters())
    assert vae.dtype == torch.float32


def test_a_missing_model_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"^base\.model: .* cannot be loaded") as caught:
        base.load_pipeline(Base(model=str(tmp_path / "nothing")))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_rejected(tiny_base, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_base, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        base.load_pipeline(Base(model=str(folder)))


def test_a_model_without_text_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="DDPMPipeline has no UNet with cross-attention"):
        base.load_pipeline(Base(model=str(tmp_path)))


def test_a_model_for_inpainting_is_refused(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(UserError, match=r"base.model: .*9 input and 4 output"):
        base.check_family(pipe)


@pytest.mark.parametrize("model", ["tiny_base", "tiny_v_base", "tiny_xl_base"])
def test_text_is_encoded_as_diffusers_encodes_it(request, model):
    """The oracle is each pipeline's own `encode_prompt`."""
    pipe = base.load_pipeline(Base(model=str(request.getfixturevalue(model))))
    captions = ["photo of a cat", "a very small dog on the grass"]
    text = text_of(pipe, captions)
    states, _, *pooled = pipe.encode_prompt(
        captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(text.states, states, rtol=0, atol=0)
    if model == "tiny_xl_base":
        torch.testing.assert_close(text.pooled, pooled[0], rtol=0, atol=0)
        assert base.family(pipe) == "Stable Diffusion XL"
    else:
        assert text.pooled is None


def test_a_missing_device_is_rejected():
    assert base.device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"base\.device: .*cuda:3"):
            base.device("cuda:3")


def test_captions_are_truncated_to_the_tokenizers_length(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    states = text_of(pipe, ["cat", "a cat on the grass " * 20]).states
    assert states.shape == (2, 16, 32)
    assert json.loads((tiny_base / "tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 16
