"""The lightened UNet against diffusers' own layers: the same values, and less kept."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from benchmarks.count_memory import counting
from benchmarks.profile_step import flop_counter
from customdiff.config import Base
from customdiff.models import base, memory_efficient, methods

HOW = {"method": "custom_diffusion", "freeze_model": "crossattn_kv", "lora_rank": 2}


def two_unets(folder, how, dtype=torch.float32):
    """A UNet with a method's weights in it, and the same lightened."""
    plain = base.load_pipeline(Base(model=str(folder)), dtype=dtype).unet
    torch.manual_seed(0)
    methods.inject(plain, how)
    light = copy.deepcopy(plain)
    memory_efficient.convert(light)
    return plain, light


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
    "how",
    [HOW, HOW | {"freeze_model": "crossattn"}, HOW | {"method": "lora"}],
    ids=["crossattn_kv", "crossattn", "lora"],
)
def test_a_lightened_unet_predicts_and_learns_the_same_and_keeps_less(request, model, how):
    plain, light = two_unets(request.getfixturevalue(model), how, torch.float64)
    assert [name for name, _ in light.named_parameters()] == [name for name, _ in plain.named_parameters()]
    expected, gradients, kept = step(plain.double())
    prediction, found, kept_lightened = step(light.double())
    torch.testing.assert_close(prediction, expected, rtol=1e-9, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert any(gradient.abs().sum() > 0 for gradient in found.values())
    assert kept_lightened < 0.8 * kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(ResnetBlock2D, (2, 32, 8, 8)), (nn.Conv2d, (2, 32, 8, 8)), (nn.Conv2d, (2, 32, 16, 16))],
    ids=["block", "convolution", "convolution of many pixels"],
)
def test_each_layer_computes_the_same_bits(tiny_base, kind, shape, dtype):
    plain, light = two_unets(tiny_base, HOW, dtype)
    name = next(
        name for name, layer in plain.named_modules() if type(layer) is kind and getattr(layer, "in_channels", 32) == 32
    )
    found = []
    for unet in (plain, light):
        layer = unet.get_submodule(name)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        time = [torch.ones(2, layer.time_emb_proj.in_features, dtype=dtype)] if kind is ResnetBlock2D else []
        y = layer(x, *time)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    assert type(layer) is not kind
    assert found[0][1].abs().sum() > 0
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gated_layer_is_as_near_to_the_exact_values_as_diffusers_own(tiny_base, dtype):
    generator = torch.Generator().manual_seed(2)
    plain, light = two_unets(tiny_base, HOW, dtype)
    name = next(name for name, layer in plain.named_modules() if type(layer) is GEGLU)
    layers = [plain.get_submodule(name), light.get_submodule(name)]
    x = torch.randn(2, 64, layers[0].proj.in_features, generator=generator).to(dtype)
    weighing = torch.randn(2, 64, layers[0].proj.out_features // 2, generator=generator).to(dtype)

    def values(layer, exact=False):
        given = (x.double() if exact else x.clone()).requires_grad_()
        y = layer(given)
        y.backward(weighing.to(y.dtype))
        return y.detach().double(), given.grad.double()

    found = [values(layer) for layer in layers]
    for each, other, exact in zip(*found, values(layers[0].double(), exact=True), strict=True):
        assert exact.abs().sum() > 0
        assert (other - exact).norm() < 1.5 * (each - exact).norm()


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="an x86 CPU's layout")
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (3, 0), (5, 1)])
def test_a_packed_convolution_takes_features_of_any_shape(size, padding):
    """The first decide whether it is packed, and have no say in what comes after, such as validation images."""
    torch.manual_seed(0)
    plain = nn.Conv2d(24, 40, size, padding=padding).requires_grad_(False)
    light = nn.Sequential(copy.deepcopy(plain))
    memory_efficient.convert(light)
    light = light[0]
    for shape in ((2, 24, 9, 7), (1, 24, 40, 48), (3, 24, 8, 8)):
        found = []
        for layer in (plain, light):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
        assert light.weight is None
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(light(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "side", "dtype"),
    [
        ({}, 17, torch.float32),
        ({}, 8, torch.float64),
        *[
            (options, 8, torch.float32)
            for options in ({"stride": 2}, {"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": 3})
        ],
    ],
    ids=str,
)
def test_a_convolution_that_would_not_gain_stays_unpacked(options, side, dtype):
    plain = nn.Conv2d(4, 4, 3, **options, dtype=dtype).requires_grad_(False)
    light = nn.Sequential(copy.deepcopy(plain))
    memory_efficient.convert(light)
    x = torch.randn(1, 4, side, side, dtype=dtype, requires_grad=True)
    assert torch.equal(light(x), plain(x))
    assert light[0].weight is not None


def test_layers_that_train_are_left_as_they_are(tiny_base):
    unet = base.load_pipeline(Base(model=str(tiny_base))).unet
    unet.requires_grad_(True)
    memory_efficient.convert(unet)
    assert not any(type(layer).__module__ == memory_efficient.__name__ for layer in unet.modules())


def test_gradient_checkpointing_goes_with_it(tiny_base):
    _, light = two_unets(tiny_base, HOW)
    _, gradients, kept = step(light)
    light.zero_grad(set_to_none=True)
    light.enable_gradient_checkpointing()
    _, again, kept_again = step(light)
    assert kept_again < kept
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_the_arithmetic_of_a_lightened_step_can_be_counted(tiny_base):
    """PyTorch's counter follows modules by hooks, which a backward pass within a backward pass would stop."""
    counts = []
    for unet in two_unets(tiny_base, HOW):
        with flop_counter() as counter:
            step(unet)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_features_of_any_layout_pass(tiny_base):
    """As diffusers' layers do, where a transpose has left the features in no layout of their own."""
    plain, light = two_unets(tiny_base, HOW)
    x = torch.randn(2, 16, 8, 8).transpose(2, 3)[:, :, ::2]
    time = torch.ones(2, plain.down_blocks[0].resnets[0].time_emb_proj.in_features)
    torch.testing.assert_close(light.down_blocks[0].resnets[0](x, time), plain.down_blocks[0].resnets[0](x, time))
