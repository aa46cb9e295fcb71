"""Our processors and trained rows against diffusers' plain classes and a full embedding table, in float64."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, CustomDiffusionAttnProcessor
from torch import nn

from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models import attention, base, modifier_tokens
from customdiff.models.text import text_encoders, token_ids
from customdiff.training import trainer


def oracle_processors(unet, train_q_out):
    """diffusers' own processors, filled as its reference script fills them."""
    modules = dict(unet.named_modules())
    processors = {}
    for name in unet.attn_processors:
        layer = modules[name.removesuffix(".processor")]
        if not layer.is_cross_attention:
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        processor = CustomDiffusionAttnProcessor(
            train_kv=True,
            train_q_out=train_q_out,
            hidden_size=layer.to_k.weight.shape[0],
            cross_attention_dim=layer.to_k.weight.shape[1],
        )
        with torch.no_grad():
            processor.to_k_custom_diffusion.weight.copy_(layer.to_k.weight)
            processor.to_v_custom_diffusion.weight.copy_(layer.to_v.weight)
            if train_q_out:
                processor.to_q_custom_diffusion.weight.copy_(layer.to_q.weight)
                processor.to_out_custom_diffusion[0].weight.copy_(layer.to_out[0].weight)
                processor.to_out_custom_diffusion[0].bias.copy_(layer.to_out[0].bias)
        processors[name] = processor
    unet.set_attn_processor(processors)


@pytest.mark.parametrize("model", ["tiny_base", "tiny_v_base", "tiny_xl_base"])
@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_gradients_of_a_step_equal_those_of_diffusers_with_a_full_table(request, model, freeze_model):
    """The oracle is diffusers throughout: its processors, whole resized tables, `encode_prompt`, SDXL's time ids."""
    pipe = base.load_pipeline(Base(model=str(request.getfixturevalue(model))), dtype=torch.float64)
    oracle = copy.deepcopy(pipe)
    encoders = text_encoders(oracle)
    rows = {name: torch.linspace(-0.1, 0.1, encoder.config.hidden_size) for name, (_, encoder) in encoders.items()}

    embeddings = modifier_tokens.add_tokens(pipe, {"<new1>": rows})
    for embedding in embeddings.values():
        embedding.trained.double()
    attention.inject_processors(pipe.unet, freeze_model)
    for processor in pipe.unet.attn_processors.values():
        if isinstance(processor, nn.Module):
            processor.double()

    tables = {}
    for name, (tokenizer, encoder) in encoders.items():
        tokenizer.add_tokens(["<new1>"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        tables[name] = encoder.get_input_embeddings().weight
        tables[name].data[-1] = rows[name].double()
    oracle_processors(oracle.unet, freeze_model == "crossattn")
    oracle.unet.double()

    noisy, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps, captions = torch.tensor([10, 700]), ["photo of a <new1> cat", "a far away <new1> dog"]
    time_ids = torch.tensor([[64.0, 48.0, 3.0, 0.0, 32.0, 32.0]] * 2, dtype=torch.float64)
    denoiser = trainer.Denoiser(pipe.unet, [encoder for _, encoder in text_encoders(pipe).values()])
    ((denoiser(noisy, steps, token_ids(pipe, captions), None, time_ids) - noise) ** 2).mean().backward()

    states, _, *pooled = oracle.encode_prompt(
        captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {"text_embeds": pooled[0], "time_ids": time_ids} if pooled else None
    ((oracle.unet(noisy, steps, states, added_cond_kwargs=added).sample - noise) ** 2).mean().backward()

    expected = {
        name: parameter.grad for name, parameter in oracle.unet.named_parameters() if "_custom_diffusion" in name
    }
    found = attention.trainable(pipe.unet)
    layers = 8 if model == "tiny_xl_base" else 7
    assert len(found) == len(expected) == layers * (2 if freeze_model == "crossattn_kv" else 5)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-14)
        assert parameter.grad.abs().max() > 0
    for name, embedding in embeddings.items():
        torch.testing.assert_close(embedding.trained.weight.grad[0], tables[name].grad[-1], rtol=1e-9, atol=1e-14)
        assert embedding.trained.weight.grad.abs().max() > 0
        assert embedding.table.weight.grad is None


def test_injecting_processors_does_not_change_the_output(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    noisy, states = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 32)
    with torch.no_grad():
        before = pipe.unet(noisy, 500, states).sample
        attention.inject_processors(pipe.unet, "crossattn")
        after = pipe.unet(noisy, 500, states).sample
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_the_first_token_gets_no_gradient(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    attention.inject_processors(pipe.unet)
    states = torch.randn(1, 16, 32, requires_grad=True)
    pipe.unet(torch.randn(1, 4, 8, 8), 500, states).sample.square().mean().backward()
    assert states.grad[:, 0].abs().max() == 0
    assert states.grad[:, 1:].abs().amin(dim=(0, 2)).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_half_precision_trains_fp32_weights(tiny_base, dtype, freeze_model):
    pipe = base.load_pipeline(Base(model=str(tiny_base)), dtype=dtype)
    weights = attention.inject_processors(pipe.unet, freeze_model)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    out = pipe.unet(torch.randn(1, 4, 8, 8, dtype=dtype), 500, torch.randn(1, 16, 32, dtype=dtype)).sample
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(weight.grad.dtype == torch.float32 and weight.grad.abs().max() > 0 for weight in weights.values())


def test_an_attention_mask_is_respected(tiny_base):
    """Text behind the mask must not reach the image; the same call on diffusers' plain attention is the oracle."""
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=32, heads=4, dim_head=4)
    plain = copy.deepcopy(layer)
    layer.set_processor(attention._processor_from(layer, True, "sdpa"))
    image, text = torch.randn(2, 9, 16), torch.randn(2, 16, 32)
    mask = torch.zeros(2, 1, 16)
    mask[:, :, 5:] = -10000.0
    with torch.no_grad():
        torch.testing.assert_close(layer(image, text, mask), plain(image, text, mask), rtol=1e-5, atol=1e-6)
        changed = text.clone()
        changed[:, 5:] += 1
        torch.testing.assert_close(layer(image, changed, mask), layer(image, text, mask), rtol=1e-5, atol=1e-6)


def test_missing_xformers_or_gpu_is_a_one_line_error(tiny_base):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    with pytest.raises(UserError, match=r"train\.attention"):
        attention.inject_processors(pipe.unet, backend="xformers")
