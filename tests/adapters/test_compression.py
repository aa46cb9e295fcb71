"""A compressed adapter is the nearest one of its rank, as numpy finds it, and draws what its product draws."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import concept_values, tiny_params
from typer.testing import CliRunner

import customdiff
from customdiff import cli
from customdiff.adapters import adapter, compression
from customdiff.adapters.config import AdapterConfig, Compression
from customdiff.errors import UserError
from customdiff.models import attention, base, modifier_tokens
from customdiff.models.text import text_encoders


def learned_adapter(folder, freeze_model="crossattn_kv"):
    """The base pipeline as it came, and an adapter whose every weight was moved at random."""
    params = tiny_params(folder)
    pipe = base.load_pipeline(params.base)
    rows = {"<new1>": {name: torch.randn(width) for name, width in widths(pipe).items()}}
    modifier_tokens.add_tokens(pipe, rows)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in attention.inject_processors(pipe.unet, freeze_model).values():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    config = {
        "base": params.base.model_dump(),
        "concepts": {"cat": concept_values()},
        "method": "custom_diffusion",
        "freeze_model": freeze_model,
    }
    return base.load_pipeline(params.base), adapter.from_pipeline(pipe, AdapterConfig.model_validate(config))


def widths(pipe):
    return {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}


def numpy_changes(pipe, learned):
    originals = attention.originals(pipe.unet, learned.config.freeze_model)
    return {
        name: weight.numpy().astype(np.float64) - originals[name].detach().numpy().astype(np.float64)
        for name, weight in learned.weights.items()
        if weight.ndim == 2
    }


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 3, "guidance_scale": 6.0, "generator": generator, "output_type": "np"}
    return pipe("photo of a <new1> cat", **arguments).images[0]


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_the_bound_of_eckart_and_young(tiny_base, freeze_model, rank):
    pipe, learned = learned_adapter(tiny_base, freeze_model)
    small = compression.compress(pipe, learned, rank=rank)
    spectra = [np.linalg.svd(change, compute_uv=False) for change in numpy_changes(pipe, learned).values()]
    bound = np.sqrt(sum((s[rank:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))
    assert bound > 0.3
    assert compression.relative_error(pipe, learned, small) == pytest.approx(bound, rel=1e-6)
    assert {len(weight) for name, weight in small.weights.items() if name.endswith("down")} == {rank}


def test_full_rank_reproduces_the_weights(tiny_base):
    pipe, learned = learned_adapter(tiny_base, "crossattn")
    small = compression.compress(pipe, learned, rank=1000)
    for name, weight in adapter.full_weights(small, pipe).items():
        torch.testing.assert_close(weight, learned.weights[name], atol=1e-6, rtol=0)
    assert any(name.endswith("to_out_custom_diffusion.0.bias") for name in small.weights)


@pytest.mark.parametrize("values", [[6.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
def test_energy_is_the_share_of_the_sum_of_singular_values(values):
    """By counting up: the fewest values whose sum reaches the share."""
    for energy in (0.05, 0.25, 0.5, 0.6, 0.75, 0.9, 0.95, 1.0):
        fewest = next(n for n in range(1, len(values) + 1) if sum(values[:n]) >= energy * sum(values) - 1e-9)
        assert compression.rank_for_energy(torch.tensor(values, dtype=torch.float64), energy) == fewest
    assert compression.rank_for_energy(torch.zeros(4), 0.6) == 1


def test_all_of_the_energy_is_all_of_the_rank():
    """Whatever the sum's last digits."""
    for seed in range(50):
        values = torch.linalg.svdvals(torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)).double())
        assert compression.rank_for_energy(values, 1.0) == 9


def test_a_size_is_kept_and_spent_where_it_gains_most(tiny_base):
    """No other ranks of the same size have a smaller error: tried by exhaustion on three weights of one shape."""
    spectra = [torch.tensor(s, dtype=torch.float64) for s in ([9.0, 8.0, 1.0], [5.0, 0.5, 0.1], [4.0, 3.5, 3.0])]
    factors = {str(n): compression.SVD(torch.eye(3), s, torch.eye(3)) for n, s in enumerate(spectra)}
    choices = np.array(np.meshgrid(*[range(1, 4)] * 3)).reshape(3, -1).T
    for count in range(3, 10):
        error = {tuple(c): sum(float((s[r:] ** 2).sum()) for s, r in zip(spectra, c, strict=True)) for c in choices}
        best = min(value for ranks, value in error.items() if sum(ranks) == count)
        found = tuple(compression.ranks_for(factors, 6 * count + 5).values())
        assert sum(found) == count
        assert error[found] == pytest.approx(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_a_size_is_that_of_the_file(tiny_base, tmp_path, dtype, freeze_model):
    pipe, learned = learned_adapter(tiny_base, freeze_model)
    for size in (20_000, 23_000, 26_000):
        adapter.save(compression.compress(pipe, learned, size=size, dtype=dtype), tmp_path)
        found = (tmp_path / "compressed_weights.safetensors").stat().st_size
        assert size - 64 * len(learned.weights) - 4 * 64 < found <= size  # no room was left for one more


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_compressed_adapter_is_smaller_and_generates_the_expanded_image(tiny_base, tmp_path, dtype):
    pipe, learned = learned_adapter(tiny_base)
    small = compression.compress(pipe, learned, rank=2, dtype=dtype)
    adapter.save(learned, tmp_path / "whole", with_pickle=False)
    adapter.save(small, tmp_path / "small", with_pickle=False)
    product = replace(learned, weights=numpy_product(pipe, small))
    loaded = base.load_pipeline(tiny_params(tiny_base).base)
    customdiff.load(loaded, tmp_path / "small")
    multiplied = pipe_with(tiny_base, product)
    np.testing.assert_allclose(draw(loaded), draw(multiplied), atol=1e-4 if dtype == torch.float32 else 5e-3)
    assert np.abs(draw(loaded) - draw(pipe_with(tiny_base, learned))).max() > 0.01
    sizes = {name: sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in ("whole", "small")}
    assert sizes["small"] < 0.7 * sizes["whole"]
    assert not list((tmp_path / "small").glob("*.bin"))


def numpy_product(pipe, small):
    originals = attention.originals(pipe.unet, "crossattn_kv")
    up = {name: weight.numpy().astype(np.float64) for name, weight in small.weights.items()}
    product = {
        name: original.detach().numpy() + up[name.replace("weight", "up")] @ up[name.replace("weight", "down")]
        for name, original in originals.items()
    }
    return {name: torch.from_numpy(weight).float() for name, weight in product.items()}


def pipe_with(folder, learned):
    pipe = base.load_pipeline(tiny_params(folder).base)
    adapter.inject(pipe, learned)
    return pipe


def run(*arguments):
    """One call of the command line inside this process; a UserError stays an exception."""
    return CliRunner().invoke(cli.commands, ["compress", *map(str, arguments)])


def test_the_command_prints_sizes_ranks_and_error(tiny_base, tmp_path):
    pipe, learned = learned_adapter(tiny_base)
    adapter.save(learned, tmp_path / "whole")
    spectra = [np.linalg.svd(change, compute_uv=False) for change in numpy_changes(pipe, learned).values()]
    out = tmp_path / "small"
    done = run(tmp_path / "whole", "--rank", 2, "--half", "--out", out)
    assert done.exit_code == 0, done.output
    before, after = (sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (tmp_path / "whole", out))
    assert f"{before / 1e3:.0f} kB -> {after / 1e3:.0f} kB ({100 * after / before:.1f} %), ranks 2 to 2" in done.output
    bound = np.sqrt(sum((s[2:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))
    assert f"{100 * bound:.1f} %" in done.output
    assert {weight.dtype for weight in adapter.read(out).weights.values()} == {torch.float16}
    assert adapter.read_config(out).compressed == Compression(ranks=[2] * len(spectra), dtype="float16")

    run(tmp_path / "whole", "--out", tmp_path / "default")
    fewest = [int(np.argmax(s.cumsum() >= 0.6 * s.sum())) + 1 for s in spectra]
    assert adapter.read_config(tmp_path / "default").compressed.ranks == fewest

    again = run(out, "--rank", 1, "--out", tmp_path / "smaller")
    assert again.exit_code == 0, again.output
    customdiff.load(base.load_pipeline(tiny_params(tiny_base).base), tmp_path / "smaller")


def test_command_errors_are_one_line_and_write_nothing(tiny_base, tiny_v_base, tmp_path):
    _, learned = learned_adapter(tiny_base)
    adapter.save(learned, tmp_path / "whole")
    for method in ("lora", "textual_inversion"):
        adapter.save(
            replace(learned, config=learned.config.with_changes(**{"method": method, "lora_rank": 2})),
            tmp_path / method,
        )
    for arguments, message in (
        (["whole", "--rank", 2, "--energy", 0.5], "--energy and --rank: "),
        (["whole", "--size-mb", 0.0001], r"--size-mb: 0\.0001 .* 0\.\d+"),
        (["whole", "--base", tiny_v_base], "trained on .*another base model"),
        (["lora"], "lora"),
        (["textual_inversion"], "textual_inversion.*custom_diffusion"),
        (["nowhere"], "no adapter found"),
        (["whole", "--rank", 2, "--out", tmp_path / "whole"], "--out: .*whole"),
    ):
        folder, *others = arguments
        done = run(tmp_path / folder, "--out", tmp_path / "out", *others)
        assert isinstance(done.exception, UserError), done.output
        assert re.search(message, str(done.exception))
        assert not list(tmp_path.glob("out*"))
