"""An adapter goes to disk and comes back exactly, in our loader and in diffusers' own; a stranger's base is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import concept_values, tiny_params
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file, save_file

import customdiff
from customdiff.adapters import adapter
from customdiff.adapters.config import AdapterConfig
from customdiff.errors import UserError
from customdiff.models import attention, base, methods, modifier_tokens
from customdiff.models.text import text_encoders, text_of

PROMPT = "photo of a <new1> cat"


@pytest.fixture(params=["tiny_base", "tiny_v_base", "tiny_xl_base"])
def any_base(request):
    """Folder of a base model of each family."""
    return request.getfixturevalue(request.param)


def teach(model, folder, method="custom_diffusion", freeze_model="crossattn_kv"):
    """A pipeline whose trained weights and two tokens were moved at random, saved to `folder`."""
    params = tiny_params(model, method=method, freeze_model=freeze_model, lora_rank=3)
    pipe = base.load_pipeline(params.base)
    torch.manual_seed(7)
    widths = {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}
    rows = {token: {name: torch.randn(width) for name, width in widths.items()} for token in ("<new1>", "<new2>")}
    modifier_tokens.add_tokens(pipe, rows)
    with torch.no_grad():
        for weight in methods.inject(pipe.unet, params.train).values():
            weight += 0.3 * torch.randn_like(weight)
    concepts = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}
    config = {
        "base": params.base.model_dump(),
        "concepts": concepts,
        **params.train.model_dump(include={"method", "freeze_model", "lora_rank"}),
    }
    adapter.save(adapter.from_pipeline(pipe, AdapterConfig.model_validate(config)), folder)
    return pipe, folder


@pytest.fixture(params=["crossattn_kv", "crossattn"])
def learned(request, tiny_base, tmp_path):
    return teach(tiny_base, tmp_path / "adapter", freeze_model=request.param)


def draw(pipe, prompt=PROMPT):
    """(32, 32, 3) float, before rounding to bytes."""
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=3, guidance_scale=6.0, generator=generator, output_type="np").images[0]


def plain(model):
    pipe = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", methods.METHODS)
def test_our_loader_generates_the_same_image(any_base, tmp_path, method):
    pipe, folder = teach(any_base, tmp_path / "adapter", method)
    loaded = base.load_pipeline(tiny_params(any_base).base)
    before = draw(loaded)
    customdiff.load(loaded, folder)
    np.testing.assert_array_equal(draw(loaded), draw(pipe))
    assert np.abs(draw(loaded) - before).max() > 0.01
    np.testing.assert_array_equal(draw(loaded, "<new1> cat on <new2> grass"), draw(pipe, "<new1> cat on <new2> grass"))


def load_tokens(pipe, folder, ending):
    """As diffusers' documentation has it: one call a token, in SDXL one a token and text encoder."""
    for token in ("<new1>", "<new2>"):
        if not hasattr(pipe, "text_encoder_2"):
            pipe.load_textual_inversion(str(folder), weight_name=f"{token}.{ending}")
            continue
        path = folder / f"{token}.{ending}"
        rows = load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)
        pipe.load_textual_inversion(
            rows["clip_l"], token=token, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            rows["clip_g"], token=token, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_diffusers_generates_the_same_image(any_base, tmp_path, ending, freeze_model):
    """The form that works: load_attn_procs with `_pipeline`, on files that name the self-attention layers too."""
    pipe, folder = teach(any_base, tmp_path / "adapter", freeze_model=freeze_model)
    other = plain(any_base)
    other.unet.load_attn_procs(folder, weight_name=f"pytorch_custom_diffusion_weights.{ending}", _pipeline=other)
    load_tokens(other, folder, ending)
    np.testing.assert_allclose(draw(other), draw(pipe), atol=1e-4)
    assert np.abs(draw(other) - draw(plain(any_base))).max() > 0.01


@pytest.mark.parametrize("method", ["textual_inversion", "lora"])
def test_diffusers_generates_the_images_of_the_baselines(any_base, tmp_path, method):
    """The baselines' files are what diffusers calls a LoRA and a textual inversion."""
    pipe, folder = teach(any_base, tmp_path / "adapter", method)
    other = plain(any_base)
    if method == "lora":
        other.load_lora_weights(folder)
    load_tokens(other, folder, "safetensors")
    np.testing.assert_allclose(draw(other), draw(pipe), atol=1e-4)
    assert np.abs(draw(other) - draw(plain(any_base))).max() > 0.01


def test_the_documented_call_of_diffusers_still_loads_nothing(learned, tiny_base):
    """Why our loader exists. When this fails, diffusers has mended it, and the README may say so."""
    _, folder = learned
    other = plain(tiny_base)
    before = draw(other)
    other.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.bin")
    np.testing.assert_array_equal(draw(other), before)


def test_half_precision_pipelines_take_the_adapter(learned, tiny_base):
    _, folder = learned
    pipe = base.load_pipeline(tiny_params(tiny_base).base, dtype=torch.bfloat16)
    customdiff.load(pipe, folder)
    assert np.isfinite(draw(pipe)).all()


def test_another_base_model_is_rejected(learned, tiny_v_base):
    _, folder = learned
    with pytest.raises(UserError, match=r"trained on .*tiny.*another base model"):
        customdiff.load(base.load_pipeline(tiny_params(tiny_v_base).base), folder)


def test_a_second_adapter_is_rejected(learned, tiny_base):
    _, folder = learned
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    customdiff.load(pipe, folder)
    with pytest.raises(UserError, match="adapter"):
        customdiff.load(pipe, folder)


def test_weights_that_were_not_injected_are_detected(learned, tiny_base):
    _, folder = learned
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    read = customdiff.load(pipe, folder)
    with torch.no_grad():
        next(iter(attention.trainable(pipe.unet).values()))[0, 0] += 1e-3
    with pytest.raises(UserError, match=r"to_k_custom_diffusion\.weight"):
        adapter.verify(pipe, read)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(UserError, match=r"<new1>|to_k_custom_diffusion|to_v_custom_diffusion"):
        adapter.verify(pipe, read)


def test_missing_and_damaged_files_are_one_line_errors(learned, tmp_path):
    _, folder = learned
    with pytest.raises(UserError, match=r"adapter.json"):
        adapter.read(tmp_path / "nowhere")
    (folder / "<new2>.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete adapter"):
        adapter.read(folder)
    weights = folder / "pytorch_custom_diffusion_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="incomplete adapter"):
        adapter.read(folder)
    config = json.loads((folder / "adapter.json").read_text())
    escaping = {"../../cat": next(iter(config["concepts"].values()))}  # exports name files after concepts
    (folder / "adapter.json").write_text(json.dumps(config | {"concepts": escaping}))
    with pytest.raises(UserError, match=r"adapter.json: .*concepts\.\.\./\.\./cat"):
        adapter.read(folder)
    (folder / "adapter.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match=r"adapter.json"):
        adapter.read(folder)


@pytest.mark.parametrize("spoil", [lambda w: w[:, 1:].contiguous(), None])
def test_a_missing_weight_or_another_shape_is_a_one_line_error(learned, tiny_base, spoil):
    _, folder = learned
    path = folder / "pytorch_custom_diffusion_weights.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("to_v_custom_diffusion.weight"))
    kept = {key: weight for key, weight in weights.items() if key != name}
    save_file(kept | ({name: spoil(weights[name])} if spoil else {}), path)
    with pytest.raises(UserError, match=r"incomplete adapter: .*to_v_custom_diffusion.weight"):
        customdiff.load(base.load_pipeline(tiny_params(tiny_base).base), folder)


def test_modifier_tokens_must_not_be_in_the_vocabulary(tiny_base):
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    with pytest.raises(UserError, match=r"modifier_token cat: .*vocabulary"):
        modifier_tokens.add_tokens(pipe, {"cat": {"text_encoder": torch.zeros(32)}})


def test_an_initial_embedding_is_the_mean_of_its_tokens(tiny_base):
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    table = pipe.text_encoder.get_input_embeddings().weight.detach().numpy().astype(np.float64)
    ids = pipe.tokenizer.convert_tokens_to_ids(["wooden</w>", "pot</w>"])
    np.testing.assert_allclose(
        modifier_tokens.initial_embedding(pipe, "wooden pot")["text_encoder"], table[ids].mean(0), rtol=1e-6
    )
    np.testing.assert_array_equal(
        modifier_tokens.initial_embedding(pipe, "pot")["text_encoder"], table[ids[1]].astype(np.float32)
    )


@pytest.mark.parametrize("token", ["cat", "Cat", "CAT"])
def test_a_word_of_the_vocabulary_is_no_modifier_token(tiny_base, token):
    """The tokenizer lowercases: Cat would take the place of cat."""
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    with pytest.raises(UserError, match=f"modifier_token {token}: "):
        modifier_tokens.add_tokens(pipe, {token: {"text_encoder": torch.randn(32)}})


def test_pooled_states_of_sdxl_know_the_words_behind_the_token_whatever_the_config_says(tiny_xl_base):
    def pooled(eos: int | None):
        pipe = base.load_pipeline(tiny_params(tiny_xl_base).base)
        for module in pipe.text_encoder_2.modules() if eos else ():
            if hasattr(module, "eos_token_id"):
                module.eos_token_id = eos
        torch.manual_seed(0)
        widths = {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}
        rows = {name: torch.randn(width) for name, width in widths.items()}
        modifier_tokens.add_tokens(pipe, {"<new1>": rows})
        return text_of(pipe, ["a <new1> cat", "a <new1> dog"]).pooled

    current, old = pooled(None), pooled(2)
    assert (old[0] - old[1]).norm() > 0.01
    torch.testing.assert_close(old, current)


def test_new_embeddings_change_no_other_token(tiny_base):
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    before = text_of(pipe, ["photo of a cat"])
    modifier_tokens.add_tokens(pipe, {"<new1>": {"text_encoder": torch.randn(32)}})
    torch.testing.assert_close(text_of(pipe, ["photo of a cat"]).states, before.states)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weights", "embedding", "fingerprint", "integers", "matrix"])
def test_an_adapter_that_is_not_finite_is_refused(tiny_base, tmp_path, part, value):
    _, folder = teach(tiny_base, tmp_path / "adapter")
    if part == "fingerprint":
        config = json.loads((folder / "adapter.json").read_text())
        config["fingerprint"][0] = value
        (folder / "adapter.json").write_text(json.dumps(config))
    else:
        path = folder / ("pytorch_custom_diffusion_weights.safetensors" if part == "weights" else "<new1>.safetensors")
        tensors = load_file(path)
        name, tensor = max(tensors.items(), key=lambda item: item[1].numel())
        tensor.flatten()[-1] = 0 if part in ("integers", "matrix") else value
        tensors[name] = (
            tensor.int() if part == "integers" else torch.stack([tensor] * 2, 1) if part == "matrix" else tensor
        )
        save_file(tensors, path)
    with pytest.raises(UserError, match=f"{'fingerprint' if part == 'fingerprint' else 'adapter: '}") as error:
        adapter.load(base.load_pipeline(tiny_params(tiny_base).base), folder)
    assert "\n" not in str(error.value)
    if part in ("weights", "embedding"):
        with pytest.raises(UserError, match="not finite"):
            adapter.read(folder)


def test_a_base_model_that_is_not_finite_has_no_fingerprint(tiny_base):
    pipe = base.load_pipeline(tiny_params(tiny_base).base)
    layer = next(m for m in pipe.unet.modules() if getattr(m, "is_cross_attention", False))
    with torch.no_grad():
        layer.to_k.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"base\.model"):
        adapter.fingerprint(pipe)
