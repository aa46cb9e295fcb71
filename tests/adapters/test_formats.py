"""Each format loads in the other program's own code and draws our image; what comes from others is not trusted."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import concept_values
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import customdiff
from customdiff import cli
from customdiff.adapters import adapter, formats
from customdiff.adapters.config import AdapterConfig
from customdiff.adapters.formats import changes, compvis, kohya, lora
from customdiff.config import Base
from customdiff.errors import UserError
from customdiff.models import base, methods, modifier_tokens
from customdiff.models.text import text_encoders

PROMPT = "photo of a <new1> cat"
BOTH = "<new1> cat on <new2> grass"
FAMILIES = ["tiny_base", "tiny_v_base", "tiny_xl_base"]
CASES = [
    ("tiny_base", "crossattn_kv"),
    ("tiny_base", "crossattn"),
    ("tiny_v_base", "crossattn_kv"),
    ("tiny_xl_base", "crossattn"),
]
CONCEPTS = {"cat": concept_values(), "dog": concept_values("<new2>", "dog")}


def draw(pipe, prompt=PROMPT):
    """(32, 32, 3) float, before rounding to bytes."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32}
    return pipe(
        prompt, num_inference_steps=3, guidance_scale=6.0, generator=generator, output_type="np", **size
    ).images[0]


def plain(folder):
    """A base model in diffusers, with nothing of ours."""
    diffusers_logging.set_verbosity_error()
    return DiffusionPipeline.from_pretrained(folder)


def learn(model: Path, folder: Path, method: str = "custom_diffusion", freeze_model: str = "crossattn_kv") -> Path:
    """An adapter of two tokens whose weights were all moved at random."""
    pipe = base.load_pipeline(Base(model=str(model)))
    torch.manual_seed(7)
    widths = {name: encoder.config.hidden_size for name, (_, encoder) in text_encoders(pipe).items()}
    rows = {name: {key: torch.randn(width) for key, width in widths.items()} for name in ("<new1>", "<new2>")}
    modifier_tokens.add_tokens(pipe, rows)
    adapter_config = AdapterConfig.model_validate(
        {"base": {"model": str(model)}, "concepts": CONCEPTS, "method": method, "freeze_model": freeze_model}
        | {"lora_rank": 3}
    )
    with torch.no_grad():
        for weight in methods.inject(pipe.unet, adapter_config).values() if method != "textual_inversion" else []:
            weight += 0.3 * torch.randn_like(weight)
    adapter.save(adapter.from_pipeline(pipe, adapter_config), folder)
    return folder


@pytest.fixture(scope="module")
def learned(request, tmp_path_factory):
    """By the base's name, method and freeze_model: an adapter's folder, its base's, and our images of two prompts."""
    made = {}

    def get(family, method="custom_diffusion", freeze_model="crossattn_kv"):
        key = family, method, freeze_model
        if key not in made:
            model = request.getfixturevalue(family)
            folder = learn(model, tmp_path_factory.mktemp("learned") / "adapter", method, freeze_model)
            pipe = base.load_pipeline(Base(model=str(model)))
            before = draw(pipe)
            customdiff.load(pipe, folder)
            images = {prompt: draw(pipe, prompt) for prompt in (PROMPT, BOTH)}
            for other in (before, images[BOTH]):
                assert np.abs(images[PROMPT] - other).max() > 0.01
            made[key] = folder, model, images
        return made[key]

    return get


def assert_same_images(pipe, images):
    for prompt, image in images.items():
        np.testing.assert_allclose(draw(pipe, prompt), image, atol=1e-4)


def load_tokens(pipe, rows: dict):
    """Textual inversions as diffusers' documentation loads them: {word: {text encoder: row}}."""
    for word, parts in rows.items():
        for name, row in parts.items():
            part = {"tokenizer": pipe.components[name.replace("text_encoder", "tokenizer")]}
            pipe.load_textual_inversion(row, token=word, text_encoder=pipe.components[name], **part)


# -- pipeline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "freeze_model"), CASES)
def test_an_exported_pipeline_works_without_customdiff(learned, tmp_path, family, freeze_model):
    folder, _, images = learned(family, freeze_model=freeze_model)
    formats.export_adapter("pipeline", folder, tmp_path / "out")
    assert_same_images(plain(tmp_path / "out"), images)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    assert "customdiff" not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))


def test_a_table_longer_than_its_vocabulary_keeps_its_length(tiny_base, tmp_path):
    """As in models whose tables are padded: new words take spare rows, and nothing is cut off."""
    pipe = plain(tiny_base)
    rows = pipe.text_encoder.get_input_embeddings().num_embeddings + 10
    pipe.text_encoder.resize_token_embeddings(rows, mean_resizing=False)
    pipe.save_pretrained(tmp_path / "padded")
    folder = learn(tmp_path / "padded", tmp_path / "adapter")
    formats.export_adapter("pipeline", folder, tmp_path / "out")
    opened = plain(tmp_path / "out")
    assert opened.text_encoder.get_input_embeddings().num_embeddings == rows
    ours = base.load_pipeline(Base(model=str(tmp_path / "padded")))
    customdiff.load(ours, folder)
    np.testing.assert_allclose(draw(opened, BOTH), draw(ours, BOTH), atol=1e-4)


# -- lora --------------------------------------------------------------------------------------------------------------


def with_lora(model, out):
    """The base in diffusers, with an exported LoRA and its tokens loaded as documented."""
    pipe = plain(model)
    if (out / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(out)
    for token in ("<new1>", "<new2>"):
        found = load_file(out / f"{token}.safetensors")
        if hasattr(pipe, "text_encoder_2"):
            load_tokens(pipe, {token: {"text_encoder": found["clip_l"], "text_encoder_2": found["clip_g"]}})
        else:
            pipe.load_textual_inversion(str(out / f"{token}.safetensors"))
    return pipe


@pytest.mark.parametrize(("family", "freeze_model"), CASES)
def test_an_exported_lora_generates_the_same_image_in_diffusers(learned, tmp_path, family, freeze_model):
    folder, model, images = learned(family, freeze_model=freeze_model)
    assert formats.export_adapter("lora", folder, tmp_path / "out").error < 1e-6
    assert_same_images(with_lora(model, tmp_path / "out"), images)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_rank_keeps_the_largest_singular_values(learned, tmp_path, form):
    """Against numpy's decomposition in float64: the weights, and the share that is left out."""
    folder, model, _ = learned("tiny_base")
    written = formats.export_adapter(form, folder, tmp_path / "out", rank=2)
    pipe = plain(model)
    own = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    file = {"lora": "pytorch_lora_weights", "kohya": "loras/cat-dog"}[form]
    pipe.load_lora_weights(load_file(tmp_path / f"out/{file}.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = dict(pipe.unet.named_parameters())
    left_out, whole = 0.0, 0.0
    for name, weight in adapter.read(folder).weights.items():
        name = name.replace(".processor.", ".").replace("_custom_diffusion", "")
        change = weight.numpy().astype(np.float64) - own[name].numpy().astype(np.float64)
        left, values, right = np.linalg.svd(change, full_matrices=False)
        expected = own[name].numpy() + (left[:, :2] * values[:2]) @ right[:2]
        np.testing.assert_allclose(found[name].detach().numpy(), expected, atol=1e-5)
        left_out, whole = left_out + (values[2:] ** 2).sum(), whole + (values**2).sum()
    assert written.error == pytest.approx((left_out / whole) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("family", "form"),
    [("tiny_base", "lora"), ("tiny_base", "kohya"), ("tiny_base", "pipeline"), ("tiny_xl_base", "lora")],
)
def test_trained_loras_are_exported_exactly(learned, tmp_path, family, form):
    """Against PEFT, which computes our own image of an adapter of train.method lora."""
    folder, model, images = learned(family, "lora")
    out = tmp_path / "out"
    assert formats.export_adapter(form, folder, out).error == 0
    if form == "pipeline":
        pipe = plain(out)
    elif form == "lora":
        pipe = with_lora(model, out)
        trained = load_file(folder / "pytorch_lora_weights.safetensors")
        written = load_file(out / "pytorch_lora_weights.safetensors")
        assert written.keys() == trained.keys()
        assert all(torch.equal(written[name], trained[name]) for name in trained)
    else:
        pipe = with_kohya(model, out)
    assert_same_images(pipe, images)


@pytest.mark.parametrize("form", ["lora", "kohya", "pipeline", "delta"])
def test_textual_inversion_exports_only_tokens(learned, tmp_path, form):
    folder, model, images = learned("tiny_base", "textual_inversion")
    out = tmp_path / "out"
    formats.export_adapter(form, folder, out)
    if form == "delta":
        pipe = with_delta(model, out / "delta.bin")
    else:
        pipe = {"lora": with_lora, "kohya": with_kohya}.get(form, lambda _, out: plain(out))(model, out)
    assert_same_images(pipe, images)
    assert not [path for path in out.rglob("*lora*") if path.is_file()]


# -- kohya -------------------------------------------------------------------------------------------------------------


def with_kohya(model, out):
    """The base in diffusers with an exported LoRA through diffusers' converter of kohya's names, and embeddings.

    Embeddings are loaded as <new1> and <new2>, so that the prompts stay the same.
    """
    pipe = plain(model)
    if (out / "loras").exists():
        pipe.load_lora_weights(out / "loras", weight_name="cat-dog.safetensors")
    load_tokens(pipe, {f"<{word}>": embedding(out, word) for word in ("new1", "new2")})
    return pipe


def embedding(out, word):
    """An embedding as AUTOMATIC1111 and ComfyUI tell the two kinds apart."""
    found = load_file(out / f"embeddings/{word}.safetensors")
    assert all(row.ndim == 2 and len(row) == 1 for row in found.values())
    if "clip_g" in found:
        return {"text_encoder": found["clip_l"], "text_encoder_2": found["clip_g"]}
    return {"text_encoder": found["emb_params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_kohya_key_names(learned, tmp_path, family):
    folder, model, images = learned(family)
    assert formats.export_adapter("kohya", folder, tmp_path / "out").error < 1e-6
    assert_same_images(with_kohya(model, tmp_path / "out"), images)


def test_kohya_key_names_of_other_programs(learned, tmp_path):
    """A key written out by hand, as sd-scripts trains it on Stable Diffusion, and the header that web UIs read."""
    folder, _, _ = learned("tiny_xl_base")
    formats.export_adapter("kohya", folder, tmp_path / "out", rank=2)
    found = load_file(tmp_path / "out/loras/cat-dog.safetensors")
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} < found.keys()
    assert found[f"{layer}.lora_down.weight"].shape == (2, 72)
    assert found[f"{layer}.lora_up.weight"].shape == (32, 2)
    assert found[f"{layer}.alpha"].item() == 2
    with safe_open(tmp_path / "out/loras/cat-dog.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_kohyas_files_hold_the_changes_of_biases(learned, tmp_path):
    """Where `crossattn` trained: diffusers refuses such entries, so they are added by hand as ComfyUI adds them."""
    folder, model, images = learned("tiny_base", freeze_model="crossattn")
    written = formats.export_adapter("kohya", folder, tmp_path / "out")
    assert ".diff_b" in written.instructions
    found = load_file(tmp_path / "out/loras/cat-dog.safetensors")
    pipe = plain(model)
    biases = {key: found.pop(key) for key in list(found) if key.endswith(".diff_b")}
    for name, module in pipe.unet.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}.diff_b"
        if key in biases:
            module.bias.data += biases.pop(key)
    assert not biases
    pipe.load_lora_weights(found)
    load_tokens(pipe, {f"<{word}>": embedding(tmp_path / "out", word) for word in ("new1", "new2")})
    assert_same_images(pipe, images)


def test_tokens_that_make_one_file_name_are_refused():
    concepts = {name: concept_values(token, name) for name, token in (("cat", "<new1>"), ("dog", "new1"))}
    with pytest.raises(UserError, match=r"--format kohya: .*<new1>, new1"):
        kohya.check(AdapterConfig.model_validate({"base": {"model": "base"}, "concepts": concepts}), None)


# -- the paper's delta -------------------------------------------------------------------------------------------------


def with_delta(model, file, compress=False):
    """The base in diffusers with a delta, by what the paper's `load_model` does with it, written afresh."""
    pipe = plain(model)
    delta = torch.load(file, weights_only=True)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    for token, rows in delta["modifier_token"].items():
        parts = dict(zip(encoders, rows if isinstance(rows, list) else [rows], strict=True))
        load_tokens(pipe, {token: parts})
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "attn2" in name and compress and ("to_k" in name or "to_v" in name):
                parameter += delta["unet"][name]["u"] @ delta["unet"][name]["v"]
            elif "attn2" in name and name in delta["unet"]:
                parameter.copy_(delta["unet"][name])
    return pipe


@pytest.mark.parametrize(("family", "freeze_model"), CASES)
def test_a_delta_generates_the_same_image_and_can_be_imported(learned, tmp_path, family, freeze_model):
    folder, model, images = learned(family, freeze_model=freeze_model)
    formats.export_adapter("delta", folder, tmp_path / "out")
    delta = torch.load(tmp_path / "out/delta.bin", weights_only=True)
    ends = ("to_k", "to_v") if freeze_model == "crossattn_kv" else ("to_k", "to_v", "to_q", "to_out")
    pipe = with_delta(model, tmp_path / "out/delta.bin")
    names = {name for name, _ in pipe.unet.named_parameters() if any(f".attn2.{end}." in name for end in ends)}
    assert delta["unet"].keys() == names
    assert_same_images(pipe, images)
    imported = bring(tmp_path / "out/delta.bin", tmp_path / "back", model, "delta")
    assert_same_adapter(imported, adapter.read(folder))
    assert_same_adapter(adapter.read(tmp_path / "back"), adapter.read(folder))


@pytest.mark.parametrize(("form", "file"), [("delta", "delta.bin"), ("compvis", "delta.ckpt")])
def test_a_compressed_adapter_is_a_compressed_delta(compressed, tmp_path, form, file):
    folder, model, images = compressed
    written = formats.export_adapter(form, folder, tmp_path / "out")
    assert "--compress" in written.instructions
    if form == "delta":
        assert_same_images(with_delta(model, tmp_path / "out" / file, compress=True), images)
    imported = bring(tmp_path / "out" / file, tmp_path / "back", model, form)
    assert imported.config.compressed.ranks[:3] == [1, 2, 3]
    assert_same_adapter(imported, adapter.read(folder))


def test_the_papers_compression_may_keep_nothing_of_a_layer(learned, tmp_path):
    """`src/compress.py` stops before the value that exceeds its share, so a layer of one strong value gets rank 0."""
    folder, model, _ = learned("tiny_base")
    delta = {"unet": {}, "modifier_token": {"<new1>": torch.randn(32)}}
    own = dict(plain(model).unet.named_parameters())
    for name in map(changes.unet_name, adapter.read(folder).weights):
        delta["unet"][name] = {"u": torch.zeros(own[name].shape[0], 0), "v": torch.zeros(0, own[name].shape[1])}
    torch.save(delta, tmp_path / "delta.bin")
    bring(tmp_path / "delta.bin", tmp_path / "back", model, "delta", ["<new1>"])
    pipe = base.load_pipeline(Base(model=str(model)))
    customdiff.load(pipe, tmp_path / "back")
    np.testing.assert_allclose(draw(pipe, "photo of a cat"), draw(plain(model), "photo of a cat"), atol=1e-4)


# Blocks with attention in Stable Diffusion 1.4, in CompVis' checkpoint and in diffusers, written out by hand.
BLOCKS = {
    **{f"input_blocks.{n}.1": f"down_blocks.{i}.attentions.{j}" for n, i, j in
       [(1, 0, 0), (2, 0, 1), (4, 1, 0), (5, 1, 1), (7, 2, 0), (8, 2, 1)]},
    "middle_block.1": "mid_block.attentions.0",
    **{f"output_blocks.{n}.1": f"up_blocks.{i}.attentions.{j}" for n, i, j in
       [(3, 1, 0), (4, 1, 1), (5, 1, 2), (6, 2, 0), (7, 2, 1), (8, 2, 2), (9, 3, 0), (10, 3, 1), (11, 3, 2)]},
}  # fmt: skip


@pytest.mark.parametrize("there", BLOCKS)
def test_compvis_block_names(there):
    end = "transformer_blocks.0.attn2.to_k.weight"
    here, there = f"{BLOCKS[there]}.{end}", f"model.diffusion_model.{there}.{end}"
    assert compvis.compvis_name(here, [2, 2, 2, 2]) == there
    assert compvis.diffusers_name(there, [2, 2, 2, 2]) == here


def test_compvis_block_names_with_unequal_levels():
    """One layer in the first level, two in the second, numbered by hand as CompVis' constructor does."""
    end = "transformer_blocks.0.attn2.to_k.weight"
    blocks = {
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.3.1": "down_blocks.1.attentions.0",
        "input_blocks.4.1": "down_blocks.1.attentions.1",
        "output_blocks.2.1": "up_blocks.0.attentions.2",
        "output_blocks.3.1": "up_blocks.1.attentions.0",
    }
    for there, here in blocks.items():
        assert compvis.compvis_name(f"{here}.{end}", [1, 2]) == f"model.diffusion_model.{there}.{end}"
        assert compvis.diffusers_name(f"model.diffusion_model.{there}.{end}", [1, 2]) == f"{here}.{end}"


def test_an_exported_compvis_delta_can_be_imported(learned, tmp_path):
    folder, model, _ = learned("tiny_base")
    formats.export_adapter("compvis", folder, tmp_path / "out")
    delta = torch.load(tmp_path / "out/delta.ckpt", weights_only=True)["state_dict"]
    read = adapter.read(folder)
    torch.testing.assert_close(
        delta["embed"], torch.stack([read.embeddings[f"<new{n}>"]["text_encoder"] for n in (1, 2)])
    )
    name = "model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_v.weight"
    own = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.processor.to_v_custom_diffusion.weight"
    torch.testing.assert_close(delta[name], read.weights[own])
    assert_same_adapter(bring(tmp_path / "out", tmp_path / "back", model, "compvis"), read)
    flat = {"state_dict": delta | {"embed": delta["embed"].flatten()}}  # as the paper's convert.py writes it
    torch.save(flat, tmp_path / "flat.ckpt")
    assert_same_adapter(bring(tmp_path / "flat.ckpt", tmp_path / "flat", model, "compvis"), read)


# -- diffusers' own training script ------------------------------------------------------------------------------------


@pytest.fixture
def reference(tiny_base, tmp_path):
    """A pipeline with diffusers' own processors, all of it moved at random, and the folder that its script writes."""

    def make(train_q_out, safe):
        torch.manual_seed(3)
        pipe = plain(tiny_base)
        processors = {}
        for name, attn in pipe.unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                cross = name.endswith("attn2")
                processors[f"{name}.processor"] = CustomDiffusionAttnProcessor(
                    train_kv=cross,
                    train_q_out=cross and train_q_out,
                    hidden_size=attn.to_k.weight.shape[0],
                    cross_attention_dim=attn.to_k.weight.shape[1] if cross else None,
                )
        pipe.unet.set_attn_processor(processors)
        folder = tmp_path / "script"
        pipe.unet.save_attn_procs(folder, safe_serialization=safe)
        row = torch.randn(32)
        load_tokens(pipe, {"<new1>": {"text_encoder": row}})
        table = pipe.text_encoder.get_input_embeddings().weight  # the script saves a view of it
        if safe:
            save_file({"<new1>": table[-1].detach()}, folder / "<new1>.safetensors")
        else:
            torch.save({"<new1>": table[-1]}, folder / "<new1>.bin")
        return pipe, folder

    return make


@pytest.mark.parametrize("train_q_out", [False, True])
@pytest.mark.parametrize("safe", [True, False])
def test_what_diffusers_script_wrote_draws_the_same(reference, tiny_base, tmp_path, safe, train_q_out):
    theirs, folder = reference(train_q_out, safe)
    if not safe:
        with pytest.raises(UserError, match=r"custom_diffusion_weights\.bin: a pickle.*--allow-pickle"):
            bring(folder, tmp_path / "out", tiny_base, "diffusers", ["<new1>"], allow_pickle=False)
        assert not (tmp_path / "out").exists()
    bring(folder, tmp_path / "out", tiny_base, "diffusers", ["<new1>"], allow_pickle=not safe)
    ours = base.load_pipeline(Base(model=str(tiny_base)))
    customdiff.load(ours, tmp_path / "out")
    np.testing.assert_allclose(draw(ours), draw(theirs), atol=1e-4)
    adapter_config = adapter.read_config(tmp_path / "out")
    assert adapter_config.freeze_model == ("crossattn" if train_q_out else "crossattn_kv")
    assert adapter_config.concepts["cat"].instance_prompt == "photo of a {} cat"
    assert adapter_config.imported["format"] == "diffusers"


def test_a_folder_of_ours_is_one_that_the_script_could_have_written(learned, tmp_path):
    """It names the self-attention layers too, by empty tensors; the adapter_values is made anew."""
    folder, model, _ = learned("tiny_base")
    assert_same_adapter(bring(folder, tmp_path / "out", model, "diffusers", allow_pickle=False), adapter.read(folder))


# -- compressed adapters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(tiny_base, tmp_path_factory):
    """A compressed adapter, its base, and our images: keys and values as factors of ranks of their own."""
    folder = tmp_path_factory.mktemp("compressed")
    whole = adapter.read(learn(tiny_base, folder / "whole", freeze_model="crossattn"))
    torch.manual_seed(5)
    weights = {}
    for number, (name, weight) in enumerate(whole.weights.items()):
        if ".to_k_" in name or ".to_v_" in name:
            stem, rank = name.removesuffix("weight"), 1 + number % 3
            weights |= {
                f"{stem}up": torch.randn(len(weight), rank),
                f"{stem}down": torch.randn(rank, weight.shape[1]),
            }
        else:
            weights[name] = weight
    adapter.save(
        adapter.Adapter(weights, whole.embeddings, whole.config.with_changes(compressed={"ranks": []})),
        folder / "adapter",
    )
    pipe = base.load_pipeline(Base(model=str(tiny_base)))
    customdiff.load(pipe, folder / "adapter")
    return folder / "adapter", tiny_base, {prompt: draw(pipe, prompt) for prompt in (PROMPT, BOTH)}


@pytest.mark.parametrize("form", ["lora", "pipeline"])
def test_a_compressed_adapter_draws_the_same_elsewhere(compressed, tmp_path, form):
    folder, model, images = compressed
    out = tmp_path / "out"
    assert formats.export_adapter(form, folder, out).error < 1e-6
    assert_same_images(plain(out) if form == "pipeline" else with_lora(model, out), images)


def test_a_compressed_adapters_factors_are_taken_as_they_are(compressed):
    folder, model, _ = compressed
    learned = adapter.read(folder)
    found = changes.low_rank(changes.source_of(learned, base.load_pipeline(Base(model=str(model)))), None)
    stem = "mid_block.attentions.0.transformer_blocks.0.attn2."
    assert torch.equal(found.layers[f"{stem}to_k"].up, learned.weights[f"{stem}processor.to_k_custom_diffusion.up"])
    assert torch.equal(found.layers[f"{stem}to_k"].down, learned.weights[f"{stem}processor.to_k_custom_diffusion.down"])


# -- what is refused ---------------------------------------------------------------------------------------------------


def bring(path, out, model, form, words=("<new1>", "<new2>"), allow_pickle=True):
    kinds = ("cat", "dog")
    concepts = [
        formats.ImportedConcept(word, kind, f"photo of a {{}} {kind}") for word, kind in zip(words, kinds, strict=False)
    ]
    return formats.import_adapter(
        form, Path(path), Path(out), base=str(model), concepts=concepts, allow_pickle=allow_pickle
    )


def assert_same_adapter(one, other):
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.embeddings.keys() == other.embeddings.keys()
    for token, rows in one.embeddings.items():
        assert all(torch.equal(row, other.embeddings[token][name]) for name, row in rows.items())


@pytest.fixture(scope="module")
def right_delta(learned, tmp_path_factory):
    """A base model, and the delta of an adapter of it."""
    folder, model, _ = learned("tiny_base")
    out = tmp_path_factory.mktemp("right") / "out"
    formats.export_adapter("delta", folder, out)
    return model, out / "delta.bin"


class Malice:
    """What a pickle can do when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_execute_no_code(tiny_base, tmp_path):
    trap = tmp_path / "ran"
    torch.save({"unet": {}, "modifier_token": Malice(trap)}, tmp_path / "delta.bin")
    with pytest.raises(UserError, match=r"delta\.bin: a pickle.*--allow-pickle"):
        bring(tmp_path / "delta.bin", tmp_path / "out", tiny_base, "delta", allow_pickle=False)
    with pytest.raises(UserError, match=r"delta\.bin: not a file of tensors") as refusal:
        bring(tmp_path / "delta.bin", tmp_path / "out", tiny_base, "delta")
    assert "\n" not in str(refusal.value)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Malice(trap)))
    with pytest.raises(UserError, match=r"raw\.bin: not a file of tensors"):
        bring(tmp_path / "raw.bin", tmp_path / "out", tiny_base, "delta")
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_a_file_that_unpacks_to_more_than_the_model_is_not_opened(tiny_base, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "delta.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(64 * 2**20))
    assert (tmp_path / "delta.bin").stat().st_size < 2**17
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=r"delta\.bin: 67,108,864 bytes, more than its base model"):
        bring(tmp_path / "delta.bin", tmp_path / "out", tiny_base, "delta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda delta: delta.pop("unet"), "has no 'unet'"),
        (lambda delta: delta.update(text_encoder={}), "text encoder"),
        (lambda delta: delta.update(unet=[1]), "has no 'unet'"),
        (lambda delta: delta["unet"].update({7: 1}), r"delta\.bin: .*by name"),
        (lambda delta: delta["modifier_token"].update({"<new2>": "row"}), "<new2> of text_encoder is str"),
        (lambda delta: delta["unet"].update({MID: torch.zeros(32, 32, device="meta")}), "to_k.weight is not"),
        (lambda delta: delta["unet"].update({MID: torch.eye(32).to_sparse()}), "to_k.weight is not"),
        (lambda delta: delta["unet"].update({MID: torch.eye(32).long()}), "to_k.weight is not"),
        (lambda delta: delta["unet"].update({MID: {"u": torch.eye(32), "v": 3}}), "to_k.weight v is int"),
        (lambda delta: delta["unet"].update({MID: {"u": torch.zeros(32, 40), "v": 3}}), "to_k.weight has rank 40"),
        (lambda delta: delta["unet"].update({MID: {"up": torch.eye(32)}}), "to_k.weight is dict"),
        (lambda delta: delta["modifier_token"].pop("<new2>"), "embedding of <new2>.*<new1>"),
        (
            lambda delta: delta["modifier_token"].update({"<new2>": torch.zeros(48)}),
            r"<new2> of text_encoder is \(48,\)",
        ),
        (lambda delta: delta["unet"].popitem(), r"lacks .*to_v\.weight"),
        (lambda delta: delta["unet"].update(strange=torch.zeros(1)), "weight strange"),
        (lambda delta: delta["unet"].update({MID: torch.zeros(32, 48)}), r"to_k.weight is \(32, 48\)"),
        (
            lambda delta: delta["unet"].update({MID: torch.zeros(1).expand(10**6, 10**6)}),
            r"to_k.weight is \(1000000, 1000000\)",
        ),
        (lambda delta: delta["unet"].update({MID: torch.full((32, 32), torch.nan)}), "to_k.weight has non-finite"),
        (lambda delta: delta["unet"].update({MID: [1.0]}), "to_k.weight is list"),
    ],
)
def test_an_invalid_delta_is_a_one_line_error(right_delta, tmp_path, change, message):
    model, file = right_delta
    delta = torch.load(file, weights_only=True)
    change(delta)
    torch.save(delta, tmp_path / "delta.bin")
    with pytest.raises(UserError, match=message) as refusal:
        bring(tmp_path / "delta.bin", tmp_path / "out", model, "delta")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


MID = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


def test_the_two_delta_formats_are_distinguished(learned, right_delta, tmp_path):
    folder, model, _ = learned("tiny_base")
    formats.export_adapter("compvis", folder, tmp_path / "compvis")
    with pytest.raises(UserError, match="--format delta"):
        bring(right_delta[1], tmp_path / "out", model, "compvis")
    with pytest.raises(UserError, match="--format compvis"):
        bring(tmp_path / "compvis/delta.ckpt", tmp_path / "out", model, "delta")
    with pytest.raises(UserError, match=r"2 tokens of 32 .*--token names 1"):
        bring(tmp_path / "compvis", tmp_path / "out", model, "compvis", ["<new1>"])


@pytest.mark.parametrize(
    ("form", "options", "method", "message"),
    [
        ("diffusers", {}, "custom_diffusion", "--format: diffusers"),
        ("onnx", {}, "custom_diffusion", "--format: .*onnx.*pipeline, lora, kohya"),
        ("pipeline", {"rank": 4}, "custom_diffusion", "--rank: "),
        ("delta", {"rank": 4}, "custom_diffusion", "--rank: "),
        ("delta", {}, "lora", "--format: .*lora"),
        ("compvis", {}, "lora", "--format: .*lora"),
    ],
)
def test_invalid_format_options_are_one_line_errors(learned, tmp_path, form, options, method, message):
    folder, _, _ = learned("tiny_base", method)
    with pytest.raises(UserError, match=message) as refusal:
        formats.export_adapter(form, folder, tmp_path / "out", **options)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_compvis_rejects_sdxl(learned, tmp_path):
    folder, _, _ = learned("tiny_xl_base")
    with pytest.raises(UserError, match=r"--format: .*Stable Diffusion XL"):
        formats.export_adapter("compvis", folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_rejected(learned, tiny_v_base, tmp_path):
    folder, _, _ = learned("tiny_base")
    with pytest.raises(UserError, match="another base model"):
        formats.export_adapter("pipeline", folder, tmp_path / "out", base=str(tiny_v_base))


def test_existing_folders_are_not_replaced(learned, tmp_path):
    folder, model, _ = learned("tiny_base")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--out: "):
        formats.export_adapter("delta", folder, tmp_path)
    with pytest.raises(UserError, match="--out: "):
        bring(folder, tmp_path, model, "diffusers")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_exports_that_do_not_reproduce_the_adapter_are_removed(learned, tmp_path, monkeypatch, form):
    """A wrong scale, as a mistake about alpha makes it, is seen when the file is loaded again."""
    folder, _, _ = learned("tiny_base")
    right = lora.equal_rank_factors
    wrong = lambda found: {name: 0.99 * weight for name, weight in right(found).items()}  # noqa: E731
    monkeypatch.setattr({"lora": lora, "kohya": kohya}[form], "equal_rank_factors", wrong)
    with pytest.raises(UserError, match=r".*attn2\.to_. *differs|differs most"):
        formats.export_adapter(form, folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- the command line --------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli.commands, [str(argument) for argument in arguments])


def test_help_lists_each_format_with_a_sentence():
    for command in ("export", "import"):
        told = " ".join(run(command, "--help").output.split())
        for name, form in formats.FORMATS.items():
            assert (f"{name} {form.description}" in told) == (command in form.directions)


def test_commands_print_how_to_open_the_files(learned, right_delta, tmp_path):
    folder, model, _ = learned("tiny_base")
    delta = right_delta[1]
    told = run("export", "--format", "lora", "--rank", "2", "--adapter", folder, "--out", tmp_path / "lora").output
    assert f'pipe.load_lora_weights("{tmp_path / "lora"}")' in told
    assert f'pipe.load_textual_inversion("{tmp_path / "lora" / "<new2>.safetensors"}")' in told
    assert "rank 2" in told
    one = ("--token", "<new1>", "--class-prompt", "cat")
    two = ("--token", "<new2>", "--class-prompt", "dog", "--out", tmp_path / "back", "--allow-pickle")
    told = run("import", delta, "--format", "delta", "--base", model, *one, *two).output
    assert f'customdiff sample "photo of a <new1> cat" --adapter {tmp_path / "back"}' in told
    assert_same_adapter(adapter.read(tmp_path / "back"), adapter.read(folder))


def test_each_token_needs_a_class_prompt(tiny_base, tmp_path):
    told = run("import", tmp_path, "--format", "delta", "--base", tiny_base, "--token", "<new1>", "--token", "<new2>",
               "--class-prompt", "cat")  # fmt: skip
    assert isinstance(told.exception, UserError)
    assert "--class-prompt: 2 tokens" in str(told.exception)
