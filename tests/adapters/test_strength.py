"""Strength of an adapter: 0 draws exactly what the base model draws, 1 what the adapter draws; between, a line."""

import numpy as np
import pytest
import torch
from conftest import concept_values, random_adapter

from customdiff.adapters import adapter, compression
from customdiff.adapters.strength import set_strength
from customdiff.config import Base
from customdiff.models import base, methods, modifier_tokens, sampling


@pytest.fixture(params=["custom_diffusion", "crossattn", "lora", "textual_inversion", "compressed"])
def injected(request, tiny_base, tmp_path):
    """A pipeline with an adapter of each kind."""
    method = request.param if request.param in ("lora", "textual_inversion") else "custom_diffusion"
    freeze = "crossattn" if request.param == "crossattn" else "crossattn_kv"
    folder = random_adapter(
        tiny_base, tmp_path / "a", concepts={"cat": concept_values()}, method=method, freeze_model=freeze
    )
    if request.param == "compressed":
        folder = compress(tiny_base, folder, tmp_path / "compressed")
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    return pipe, adapter.load(pipe, folder)


def compress(tiny_base, folder, out):
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    adapter.save(compression.compress(pipe, adapter.read(folder), rank=2), out)
    return out


def draw(pipe, prompt: str) -> np.ndarray:
    (image,) = sampling.generate(pipe, [prompt], [3], steps=3, guidance_scale=3.0, progress=None)
    return np.asarray(image)


def state(pipe) -> dict[str, torch.Tensor]:
    weights = {name: weight.detach().clone() for name, weight in methods.trainable(pipe.unet).items()}
    embeddings = modifier_tokens.learned_embeddings(pipe)
    return weights | {f"{token} {name}": v for token, each in embeddings.items() for name, v in each.items()}


def test_zero_draws_what_the_base_model_draws(injected, tiny_base):
    pipe, learned = injected
    set_strength(pipe, learned, 0)
    plain = base.load_pipeline(Base(model=str(tiny_base)))
    np.testing.assert_array_equal(draw(pipe, "photo of a cat"), draw(plain, "photo of a cat"))


def test_one_is_the_adapter_whatever_was_before(injected):
    pipe, learned = injected
    before, image = state(pipe), draw(pipe, "photo of a <new1> cat")
    for strength in (0, 0.3, 1.5, 1):
        set_strength(pipe, learned, strength)
    after = state(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    np.testing.assert_array_equal(draw(pipe, "photo of a <new1> cat"), image)


def test_between_and_above_lie_on_a_line(injected):
    pipe, learned = injected
    points = {}
    for strength in (0, 0.5, 1, 1.5):
        set_strength(pipe, learned, strength)
        points[strength] = state(pipe)
    for name, start in points[0].items():
        change = points[1][name].double() - start.double()
        for strength in (0.5, 1.5):
            expected = start.double() + strength * change
            torch.testing.assert_close(points[strength][name].double(), expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(points[0][name], points[1][name]) for name in points[0])


def test_the_embedding_starts_at_the_class(injected):
    pipe, learned = injected
    set_strength(pipe, learned, 0)
    words = learned.config.concepts["cat"].initializer or learned.config.concepts["cat"].class_prompt
    for name, vector in modifier_tokens.initial_embedding(pipe, words).items():
        torch.testing.assert_close(modifier_tokens.learned_embeddings(pipe)["<new1>"][name], vector)
