"""Memory-efficient layers against diffusers' own: the same values, and less kept."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from benchmarks.count_memory import counting
from customdiff.config import Base, Train
from customdiff.models import base, memory_efficient, methods

KEYS_AND_VALUES = Train(lora_rank=2)


def two_unets(folder, trained, dtype=torch.float32):
    """A UNet with a method's weights in it, and a memory-efficient copy."""
    plain = base.load_pipeline(Base(model=str(folder)), dtype=dtype).unet
    torch.manual_seed(0)
    methods.inject(plain, trained)
    efficient = copy.deepcopy(plain)
    memory_efficient.convert(efficient)
    return plain, efficient


def inputs(unet):
    config, generator = unet.config, torch.Generator().manual_seed(1)
    noisy = torch.randn(4, 4, 8, 8, generator=generator).to(unet.dtype, memory_format=torch.channels_last)
    text = torch.randn(4, 16, config.cross_attention_dim, generator=generator).to(unet.dtype)
    added = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn(4, pooled, generator=generator).to(unet.dtype),
            "time_ids": torch.ones(4, 6),
        }
    return noisy, torch.tensor([1, 50, 500, 900]), text, added


def step(unet):
    """Prediction, gradients by name, and the bytes of activations that autograd kept."""
    noisy, timesteps, text, added = inputs(unet)
    with counting(unet) as kept:
        prediction = unet(noisy, timesteps, text, added_cond_kwargs=added).sample
    prediction.square().mean().backward()
    gradients = {name: weight.grad for name, weight in unet.named_parameters() if weight.requires_grad}
    return prediction.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("model", ["tiny_base", "tiny_v_base", "tiny_xl_base"])
@pytest.mark.parametrize(
    "trained",
    [KEYS_AND_VALUES, Train(freeze_model="crossattn"), Train(method="lora", lora_rank=2)],
    ids=["crossattn_kv", "crossattn", "lora"],
)
def test_a_memory_efficient_unet_gives_equal_gradients_and_saves_less(request, model, trained):
    plain, efficient = two_unets(request.getfixturevalue(model), trained, torch.float64)
    assert [name for name, _ in efficient.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected, gradients, kept = step(plain.double())
    prediction, found, kept_efficient = step(efficient.double())
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert any(gradient.abs().sum() > 0 for gradient in found.values())
    assert kept_efficient < 0.8 * kept


def test_a_gated_layer_in_fp32_is_as_close_to_float64_as_diffusers_own(tiny_base):
    generator = torch.Generator().manual_seed(2)
    plain, efficient = two_unets(tiny_base, KEYS_AND_VALUES)
    name = next(name for name, layer in plain.named_modules() if type(layer) is GEGLU)
    layers = [plain.get_submodule(name), efficient.get_submodule(name)]
    x = torch.randn(2, 64, layers[0].proj.in_features, generator=generator)
    weighing = torch.randn(2, 64, layers[0].proj.out_features // 2, generator=generator)

    def values(layer, dtype):
        given = x.detach().clone().to(dtype).requires_grad_()
        y = layer(given)
        y.backward(weighing.to(dtype))
        return y.detach().double(), given.grad.double()

    found = [values(layer, torch.float32) for layer in layers]
    for own, other, exact in zip(*found, values(layers[0].double(), torch.float64), strict=True):
        assert exact.abs().sum() > 0
        assert (other - exact).norm() < 1.5 * (own - exact).norm()


def width(layer):
    """Channels that a layer takes in."""
    return layer.proj.in_features if isinstance(layer, GEGLU) else layer.in_channels


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"),
    [
        (ResnetBlock2D, (2, 32, 8, 8), torch.float32),
        (ResnetBlock2D, (2, 32, 8, 8), torch.bfloat16),
        (nn.Conv2d, (2, 32, 8, 8), torch.float32),
        (nn.Conv2d, (2, 32, 8, 8), torch.bfloat16),
        (GEGLU, (2, 64, 32), torch.bfloat16),
    ],
    ids=str,
)
def test_each_layer_computes_the_same_bits(tiny_base, kind, shape, dtype):
    plain, efficient = two_unets(tiny_base, KEYS_AND_VALUES, dtype)
    name = next(name for name, layer in plain.named_modules() if type(layer) is kind and width(layer) == 32)
    found = []
    for unet in (plain, efficient):
        layer = unet.get_submodule(name)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        x = (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()
        time = [torch.ones(2, layer.time_emb_proj.in_features, dtype=dtype)] if kind is ResnetBlock2D else []
        y = layer(x, *time)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    assert type(layer) is not kind
    assert found[0][1].abs().sum() > 0
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": 3}],
    ids=str,
)
def test_a_convolution_of_any_kind_computes_what_torch_computes(options):
    plain = nn.Conv2d(4, 4, 3, **options).requires_grad_(False)
    efficient = nn.Sequential(copy.deepcopy(plain))
    memory_efficient.convert(efficient)
    found = []
    for layer in (plain, efficient):
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_trained_layers_are_not_converted(tiny_base):
    unet = base.load_pipeline(Base(model=str(tiny_base))).unet
    unet.requires_grad_(True)
    memory_efficient.convert(unet)
    assert not any(type(layer).__module__ == memory_efficient.__name__ for layer in unet.modules())


def test_gradient_checkpointing_is_supported(tiny_base):
    _, efficient = two_unets(tiny_base, KEYS_AND_VALUES)
    _, gradients, kept = step(efficient)
    efficient.zero_grad(set_to_none=True)
    efficient.enable_gradient_checkpointing()
    _, again, kept_again = step(efficient)
    assert kept_again < kept
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_any_memory_format_is_supported(tiny_base):
    """As diffusers' layers do, where a transpose has left the features in no layout of their own."""
    plain, efficient = two_unets(tiny_base, KEYS_AND_VALUES)
    x = torch.randn(2, 16, 8, 8).transpose(2, 3)[:, :, ::2]
    time = torch.ones(2, plain.down_blocks[0].resnets[0].time_emb_proj.in_features)
    torch.testing.assert_close(efficient.down_blocks[0].resnets[0](x, time), plain.down_blocks[0].resnets[0](x, time))
