"""Training: losses by hand, a whole step against an independent one in float64, and runs that end alike."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import concept_values, tiny_params, write_prepared
from diffusers import DDPMScheduler

from customdiff import files
from customdiff.adapters import adapter
from customdiff.config import Params, Tracking, Train
from customdiff.errors import UserError, one_line_errors
from customdiff.files import sha256
from customdiff.models import attention, base, memory_efficient, methods, modifier_tokens
from customdiff.models.text import text_encoders, text_of
from customdiff.preparation import prepared_set
from customdiff.tracking import Tracker
from customdiff.training import batches, launch, objective, trainer
from customdiff.training.identity import run_identity

WEIGHTS = "adapter/pytorch_custom_diffusion_weights.safetensors"


def untracked(run_id):
    return Tracker()


def train(params: Params, tmp_path: Path, name: str = "runs"):
    prepared = tmp_path / "prepared"
    if not prepared.exists():
        write_prepared(prepared, params)
    return trainer.run(params, prepared, tmp_path / name, untracked)


def learned(run) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted((run.path / "adapter").glob("*.safetensors"))}


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 5, 4, 6, 6))
    mask = (rng.uniform(size=(3, 1, 6, 6)) < 0.4).astype(float)
    error = (prediction - target) ** 2
    instance = np.mean([(error[i] * mask[i]).sum() / mask[i].sum() for i in range(3)])
    found = objective.losses(*(torch.tensor(x) for x in (prediction, target, mask)))
    np.testing.assert_allclose([float(x) for x in found], [instance, error[3:].mean()], rtol=1e-5)
    alone, none = objective.losses(*(torch.tensor(x[:3]) for x in (prediction, target, mask)))
    assert none is None
    np.testing.assert_allclose(float(alone), instance, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_targets_against_the_formula(kind):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind)
    clean, noise = torch.randn(2, 2, 4, 8, 8)
    batch = batches.Batch(clean, noise, torch.tensor([3, 900]), None, None, None, None)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    signal = np.cumprod(1 - betas)[[3, 900]].reshape(2, 1, 1, 1)
    velocity = np.sqrt(signal) * noise.numpy() - np.sqrt(1 - signal) * clean.numpy()
    expected = noise.numpy() if kind == "epsilon" else velocity
    np.testing.assert_allclose(objective.target_of(scheduler, batch), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"base\.model: .*'sample'"):
        objective.target_of(DDPMScheduler(prediction_type="sample"), batch)


@pytest.mark.parametrize(
    ("options", "processes", "expected"),
    [
        ({"batch_size": 2, "learning_rate": 1e-5}, 1, (4e-5, 4e-5)),  # the guide's single concept: 1e-5 * 2 * 2
        ({"batch_size": 2, "learning_rate": 1e-5, "with_prior_preservation": False}, 1, (2e-5, 2e-5)),
        ({"batch_size": 3, "learning_rate": 1.0, "gradient_accumulation_steps": 5}, 2, (60.0, 60.0)),
        ({"batch_size": 3, "learning_rate": 0.5, "scale_lr": False}, 2, (0.5, 0.5)),
        ({"batch_size": 2, "learning_rate": 1e-5, "token_learning_rate": 1e-3}, 1, (4e-5, 4e-3)),
    ],
)
def test_the_rates_are_scaled_as_in_the_reference(options, processes, expected):
    assert objective.learning_rates(Train(**options), processes) == pytest.approx(expected)


@pytest.mark.parametrize("token_rate", [None, 1e-2])
def test_the_first_step_equals_adamw_by_hand(tiny_base, tmp_path, token_rate):
    """One step of the whole trainer, then AdamW's first update worked out in float64 from the logged gradient norm.

    At its first step Adam moves each weight by rate * g / (|g| + eps'), which is the rate itself wherever the
    gradient is not tiny; decay takes rate * weight_decay * weight of the attention weights, nothing of the rows.
    """
    rates = {"learning_rate": 1e-3, "token_learning_rate": token_rate}
    params = tiny_params(tiny_base, max_steps=1, scale_lr=False, **rates, adam_weight_decay=0.5)
    run = train(params, tmp_path)
    pipe = base.load_pipeline(params.base)
    after = adapter.read(run.path / "adapter")
    layers = dict(pipe.unet.named_parameters())
    steps = []
    for name, weight in after.weights.items():
        start = layers[name.replace("processor.", "").replace("_custom_diffusion", "")].detach().double()
        steps.append(((weight.double() - start * (1 - 1e-3 * 0.5)).abs() / 1e-3).flatten())
    moved = torch.cat(steps)
    assert moved.max() < 1.01
    assert moved.median() > 0.9
    start = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("cat</w>")]
    row = (after.embeddings["<new1>"]["text_encoder"].double() - start.detach().double()).abs() / (token_rate or 1e-3)
    assert 0.9 < row.median() < row.max() < 1.01


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_only_trained_weights_change(tiny_base, tmp_path, freeze_model):
    params = tiny_params(tiny_base, freeze_model=freeze_model, max_steps=3)
    write_prepared(tmp_path / "prepared", params)
    accelerator = trainer._accelerator(params)
    pipe, vae, scale = trainer._load_base(params, accelerator.device)
    before = {
        f"{part}.{name}": weight.clone()
        for part in ("unet", "text_encoder")
        for name, weight in getattr(pipe, part).state_dict().items()
    }
    trained = trainer._make_trainable(pipe, params, None)
    weights = attention.trainable(pipe.unet)
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    sets = trainer._load_sets(params, tmp_path / "prepared")
    steps = trainer._trainer(params, sets, pipe, vae, scale, trained, accelerator)
    for number in range(3):
        steps.step(number)
    now = {
        f"{part}.{name}".replace("embedding.table", "embedding"): weight
        for part in ("unet", "text_encoder")
        for name, weight in getattr(pipe, part).state_dict().items()
    }
    assert all(torch.equal(now[name], weight) for name, weight in before.items())
    assert all(not torch.equal(weight, first[name]) for name, weight in weights.items())
    assert len(weights) == 7 * (2 if freeze_model == "crossattn_kv" else 5)


def test_equal_runs_give_equal_bits_and_another_seed_does_not(tiny_base, tmp_path):
    params = tiny_params(tiny_base)
    first, again = (learned(train(params, tmp_path, name)) for name in ("a", "b"))
    assert first == again
    other = params.model_copy(update={"base": params.base.model_copy(update={"seed": 43})})
    assert learned(train(other, tmp_path, "c")) != first


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny_base", {}),
        ("tiny_base", {"lr_scheduler": "cosine"}),
        ("tiny_base", {"method": "lora"}),
        ("tiny_xl_base", {}),
        ("tiny_xl_base", {"method": "textual_inversion"}),
    ],
)
def test_a_killed_run_continues_to_the_same_bits(request, tmp_path, model, options):
    params = tiny_params(request.getfixturevalue(model), gradient_accumulation_steps=2, **options)
    whole = train(params, tmp_path, "whole")
    killed = train(params, tmp_path, "killed")
    (killed.path / "complete").unlink()
    shutil.rmtree(killed.path / "adapter")
    for step in ("step-000004", "step-000006"):
        shutil.rmtree(killed.path / step)
    (killed.path / ".step-000004.0badf00d0badf00d.incoming").mkdir()  # as a kill in the middle of writing leaves it
    continued = train(params, tmp_path, "killed")
    assert learned(continued) == learned(whole)
    rows = [path.joinpath("steps.csv").read_text().splitlines() for path in (whole.path, continued.path)]
    assert len(rows[0]) == 7
    assert rows[0] == rows[1]
    assert not list(continued.path.glob(".*"))
    before = torch.load(continued.path / "step-000002/state.pt", weights_only=True)["seconds"]
    assert 0 < before < continued.metrics()["seconds"]


def test_an_edited_parameter_starts_a_new_run(tiny_base, tmp_path):
    params = tiny_params(tiny_base)
    first = train(params, tmp_path)
    (first.path / "complete").unlink()
    edited = tiny_params(tiny_base, learning_rate=2e-3)
    second = train(edited, tmp_path)
    assert second.path != first.path
    assert learned(second) == learned(train(edited, tmp_path, "fresh"))
    more_images = tiny_params(tiny_base, validation={"prompts": ["a cat"], "every": 3, "steps": 1})
    prepared = tmp_path / "prepared"
    assert run_identity(more_images, prepared, 1) == run_identity(params, prepared, 1)


def test_edited_code_starts_a_new_run(tiny_base, tmp_path, monkeypatch):
    params = tiny_params(tiny_base)
    prepared = write_prepared(tmp_path / "prepared", params)
    before = run_identity(params, prepared, 1)
    monkeypatch.setattr(files, "PACKAGE", shutil.copytree(files.PACKAGE, tmp_path / "customdiff"))
    assert run_identity(params, prepared, 1) == before
    with (tmp_path / "customdiff/models/methods.py").open("a") as code:
        code.write("# edited\n")
    assert run_identity(params, prepared, 1) != before


def test_a_named_gpu_excludes_several_processes(tiny_base, monkeypatch):
    monkeypatch.setattr(base, "device", torch.device)
    params = tiny_params(tiny_base, launch={"num_processes": 2})
    params = params.model_copy(update={"base": params.base.model_copy(update={"device": "cuda:1"})})
    with pytest.raises(UserError, match=r"base\.device: cuda:1.*num_processes"):
        trainer._accelerator(params)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_training_is_refused(kind):
    with pytest.raises(UserError, match=rf"train\.launch\.config_file: {kind}"):
        trainer.check_distributed_type(DistributedType[kind])
    trainer.check_distributed_type(DistributedType.MULTI_GPU)


def test_a_changed_base_model_starts_a_new_run(tiny_base, tmp_path):
    model = shutil.copytree(tiny_base, tmp_path / "base")
    params = tiny_params(model)
    prepared = write_prepared(tmp_path / "prepared", params)
    before = run_identity(params, prepared, 1)
    assert run_identity(params, prepared, 1) == before
    (model / "README.md").write_text("What it is.")
    assert run_identity(params, prepared, 1) == before
    weights, schedule = model / "unet/diffusion_pytorch_model.safetensors", model / "scheduler/scheduler_config.json"
    for path, old, new in ((weights, b"", b"\0"), (schedule, b"epsilon", b"v_prediction")):
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new) if old else content + new)
        assert run_identity(params, prepared, 1) != before
        path.write_bytes(content)


def test_a_complete_run_is_handed_over_again(tiny_base, tmp_path):
    """A process that is killed between the end of its training and DVC's commit is not trained a second time."""
    params = tiny_params(tiny_base)
    first = train(params, tmp_path)
    marks = {path.stat().st_mtime_ns for path in first.path.glob("step-*/state.pt")}
    again = train(params, tmp_path)
    assert {path.stat().st_mtime_ns for path in again.path.glob("step-*/state.pt")} == marks
    weights = learned(first)
    (first.path / "complete").unlink()  # as a kill between the last checkpoint and the results leaves it
    shutil.rmtree(first.path / "adapter")
    again = train(params, tmp_path)
    assert {path.stat().st_mtime_ns for path in again.path.glob("step-*/state.pt")} == marks
    assert learned(again) == weights
    again.copy_results(tmp_path / "models/adapter", tmp_path / "results/train")
    assert sha256(tmp_path / "models" / WEIGHTS) == sha256(first.path / WEIGHTS)
    with_images = tiny_params(tiny_base, validation={"prompts": ["a cat"], "every": 3, "steps": 1})
    assert len(list(train(with_images, tmp_path).path.glob("validation/*.png"))) == 6  # two images at steps 0, 3 and 6


@pytest.mark.parametrize("step", [2, 3])
def test_a_signal_ends_a_run_with_a_checkpoint(tiny_base, tmp_path, monkeypatch, step):
    """At any step, also one of validation; the continued run has the weights and the images of an undisturbed one."""
    params = tiny_params(tiny_base, checkpointing_steps=6, validation={"prompts": ["a cat"], "every": 3, "steps": 1})
    whole = train(params, tmp_path, "whole")
    ended = []

    class Recorder(Tracker):
        def finish(self, status="FINISHED"):
            ended.append(status)

    one_step = trainer.Trainer.step

    def step_with_signal(self, number):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_step(self, number)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped, one_line_errors():
        patched.setattr(trainer.Trainer, "step", step_with_signal)
        trainer.run(params, tmp_path / "prepared", tmp_path / "stopped", lambda run_id: Recorder())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert ended == ["KILLED"]
    (folder,) = (path for path in (tmp_path / "stopped").iterdir() if path.is_dir())
    assert [path.name for path in folder.glob("step-*")] == [f"step-{step:06d}"]
    continued = train(params, tmp_path, "stopped")
    assert learned(continued) == learned(whole)
    images = [{path.name: sha256(path) for path in run.path.glob("validation/*")} for run in (whole, continued)]
    assert len(images[0]) == 6
    assert images[0] == images[1]


@pytest.mark.parametrize("every", [1, 4])
def test_a_diverging_run_stops_in_one_line(tiny_base, tmp_path, monkeypatch, every):
    params = tiny_params(tiny_base, learning_rate=1e10, max_steps=20, checkpointing_steps=1)
    params = params.model_copy(update={"tracking": Tracking(log_every=every)})
    with pytest.raises(UserError, match=r"train\.learning_rate: .* not finite .*last good checkpoint: ") as error:
        train(params, tmp_path)
    assert "\n" not in str(error.value)
    for checkpoint in tmp_path.glob("runs/*/step-*"):
        assert all(weight.isfinite().all() for weight in adapter.read(checkpoint).weights.values())
    assert not list(tmp_path.glob("runs/*/complete"))


def test_two_processes_cannot_train_the_same_run(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    params = tiny_params(tiny_base)
    run = train(params, tmp_path)
    with files.locked(run.path), pytest.raises(UserError, match=f"process {os.getpid()} is writing it"):
        train(params, tmp_path)


def test_old_checkpoints_are_removed(tiny_base, tmp_path):
    run = train(tiny_params(tiny_base, checkpointing_steps=1, checkpoints_total_limit=2), tmp_path)
    assert [path.name for path in run.checkpoints()] == ["step-000005", "step-000006"]


def test_results_are_copied_completely(tiny_base, tmp_path):
    params = tiny_params(tiny_base, validation={"prompts": ["a <new1> cat"], "every": 3, "steps": 2})
    run = train(params, tmp_path)
    run.copy_results(tmp_path / "models/adapter", tmp_path / "results/train")
    assert sha256(tmp_path / "models" / WEIGHTS) == sha256(run.path / WEIGHTS)
    assert len(list((tmp_path / "results/train/validation").glob("*.png"))) == 6  # two images at steps 0, 3 and 6
    metrics = json.loads((tmp_path / "results/train/metrics.json").read_text())
    assert metrics["steps"] == 6
    assert (
        metrics["trained_parameters"]
        == sum(w.numel() for w in adapter.read(run.path / "adapter").weights.values()) + 32
    )
    adapter_config = adapter.read_config(tmp_path / "models/adapter")
    assert adapter_config.concepts["cat"].modifier_token == "<new1>"


def test_a_continued_run_keeps_no_validation_images_of_other_prompts(tiny_base, tmp_path):
    def params(*prompts):
        return tiny_params(tiny_base, validation={"prompts": list(prompts), "every": 3, "steps": 2})

    run = train(params("a {} on the grass", "a {} in the snow"), tmp_path)
    for name in ("complete", "step-000006"):  # as if it had been interrupted after step 4
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = train(params("a {} on sand"), tmp_path)
    assert again.path == run.path
    found = sorted(path.name for path in (run.path / "validation").iterdir())
    assert found == ["step000006-prompt0-0.png", "step000006-prompt0-1.png"]  # two images of the only prompt


def test_validation_prompts_are_filled_in_for_every_concept(tiny_base, tmp_path):
    """The images of a prompt with {} are those of the prompts that a user would write out for each concept."""
    concepts = {"cat": concept_values(), "rex": concept_values("<new2>", "dog")}
    written = ["a <new1> cat", "a <new2> dog", "the grass"]
    images = {}
    for name, prompts in (("short", ["a {}", "the grass"]), ("long", written)):
        validation = {"prompts": prompts, "every": 6, "steps": 1, "num_images": 1}
        run = train(tiny_params(tiny_base, concepts=concepts, validation=validation), tmp_path / name)
        images[name] = {path.name: sha256(path) for path in (run.path / "validation").iterdir()}
    assert len(set(images["long"].values())) == 6
    assert images["short"] == images["long"]


def test_pixels_are_encoded_in_fp32_whatever_the_precision_of_training(tiny_base):
    """SDXL's VAE overflows in fp16."""
    for cached, dtype in ((True, None), (False, torch.float32)):
        params = tiny_params(tiny_base, prepare={"cache_latents": cached}, mixed_precision="bf16")
        pipe, vae, _ = trainer._load_base(params, torch.device("cpu"))
        assert pipe.unet.dtype == torch.bfloat16
        assert (vae.dtype if vae else None) == dtype


def test_options_of_the_reference_train(tiny_v_base, tmp_path):
    """v-prediction, two concepts, pixels instead of latents, checkpointed gradients, no prior, bf16."""
    params = tiny_params(
        tiny_v_base,
        concepts={"cat": concept_values(), "dog": concept_values("<new2>", "dog")},
        prepare={"cache_latents": False},
        gradient_checkpointing=True,
        mixed_precision="bf16",
        with_prior_preservation=False,
        set_grads_to_none=False,
        max_steps=3,
    )
    run = train(params, tmp_path)
    learned_adapter = adapter.read(run.path / "adapter")
    assert set(learned_adapter.embeddings) == {"<new1>", "<new2>"}
    pipe = base.load_pipeline(params.base)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    for token, word in (("<new1>", "cat</w>"), ("<new2>", "dog</w>")):
        assert not torch.equal(
            learned_adapter.embeddings[token]["text_encoder"], table[pipe.tokenizer.convert_tokens_to_ids(word)]
        )


@pytest.mark.parametrize("model", ["tiny_base", "tiny_v_base", "tiny_xl_base"])
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_learns_on_every_family(request, tmp_path, model, method):
    """What a method trains moves, what it does not stays, and the adapter loads into a fresh pipeline."""
    params = tiny_params(request.getfixturevalue(model), method=method, lora_rank=2, max_steps=3)
    run = train(params, tmp_path)
    found = adapter.read(run.path / "adapter")
    pipe = base.load_pipeline(params.base)
    starts = modifier_tokens.initial_embedding(pipe, "cat")
    adapter.inject(pipe, found)
    assert set(found.embeddings["<new1>"]) == set(starts) == set(text_encoders(pipe))
    for name, start in starts.items():
        assert torch.equal(found.embeddings["<new1>"][name], start) == (method == "lora")
    if method == "custom_diffusion":
        originals = attention.originals(pipe.unet, "crossattn_kv")
        assert all(not torch.equal(weight, originals[name]) for name, weight in found.weights.items())
        assert len(found.weights) == len(originals)
    if method == "lora":
        layers = 4 * len(pipe.unet.attn_processors)
        changes = [weight for name, weight in found.weights.items() if ".lora_B." in name]
        assert len(changes) == layers
        assert all(weight.abs().max() > 0 and weight.shape[1] == 2 for weight in changes), "B starts from zero"
    if method == "textual_inversion":
        assert not found.weights
    rows = run.path.joinpath("steps.csv").read_text()
    assert ("prior_loss" in rows) == (method != "textual_inversion"), "a frozen UNet has no prior to preserve"


def test_sdxl_gets_the_size_and_crop_of_each_view(tiny_xl_base, tmp_path):
    """The photos of the prepared set are 50 x 40; a view of 32 px of their 40 px square starts at most 8 px in."""
    params = tiny_params(tiny_xl_base, prepare={"augmentation": False})
    write_prepared(tmp_path / "prepared", params)
    accelerator = trainer._accelerator(params)
    pipe, vae, scale = trainer._load_base(params, accelerator.device)
    trainer._make_trainable(pipe, params, None)
    sets = trainer._load_sets(params, tmp_path / "prepared")
    batch = batches.Batches(sets, pipe, vae, scale, params, accelerator).draw(0)
    assert batch.time_ids.shape == (4, 6)
    assert batch.time_ids[:, [0, 1, 4, 5]].tolist() == [[40, 50, 32, 32]] * 4
    assert batch.time_ids[:, 2].tolist() == [0] * 4
    assert 0 < batch.time_ids[:, 3].max() <= 8


def test_each_class_image_has_its_own_caption(tiny_xl_base, tmp_path):
    """States of class captions are computed once; each must reach the image it belongs to."""
    params = tiny_params(tiny_xl_base)
    write_prepared(tmp_path / "prepared", params)
    accelerator = trainer._accelerator(params)
    pipe, vae, scale = trainer._load_base(params, accelerator.device)
    trainer._make_trainable(pipe, params, None)
    sets = trainer._load_sets(params, tmp_path / "prepared")
    drawn_batches = batches.Batches(sets, pipe, vae, scale, params, accelerator)
    for number in range(3):
        chosen = prepared_set.batch_indices(len(sets[1]), 2, params.base.seed + 1, number)
        alone = text_of(pipe, [sets[1].captions[index] for index in chosen])
        found = drawn_batches.draw(number).class_text
        torch.testing.assert_close(found.states, alone.states, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.pooled, alone.pooled, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(tiny_base, tmp_path):
    """Activations are computed again in the backward pass: the same numbers by another way."""
    plain = train(tiny_params(tiny_base, max_steps=2), tmp_path / "a")
    recomputed = train(tiny_params(tiny_base, max_steps=2, gradient_checkpointing=True), tmp_path / "b")
    for name, weight in adapter.read(plain.path / "adapter").weights.items():
        torch.testing.assert_close(
            adapter.read(recomputed.path / "adapter").weights[name], weight, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_large_image_trains_on_a_memory_efficient_unet(tiny_base, tmp_path, monkeypatch, precision):
    """It learns what diffusers' layers learn; here for a small image, by another threshold."""
    converted = []
    monkeypatch.setattr(
        memory_efficient,
        "convert",
        lambda unet, convert=memory_efficient.convert, **options: converted.append(convert(unet, **options)),
    )
    params = tiny_params(tiny_base, max_steps=2, mixed_precision=precision)
    plain = adapter.read(train(params, tmp_path / "a").path / "adapter").weights
    assert not converted
    monkeypatch.setattr(trainer, "MEMORY_EFFICIENT_FROM", params.prepare.resolution)
    found = adapter.read(train(params, tmp_path / "b").path / "adapter").weights
    assert converted
    for name, weight in plain.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_compiling_needs_a_compiler(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"train\.compile: needs a C\+\+ compiler"):
        train(tiny_params(tiny_base, max_steps=1, compile=True), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_blocks_train_the_same_weights(tiny_base, tmp_path, monkeypatch):
    """Layers that are not compiled are memory-efficient; and a run that was killed ends with the same bits."""
    monkeypatch.setattr(trainer, "MEMORY_EFFICIENT_FROM", 8)
    plain = train(tiny_params(tiny_base, max_steps=2), tmp_path / "a")
    params = tiny_params(tiny_base, max_steps=2, compile=True, checkpointing_steps=1)
    compiled = train(params, tmp_path / "b")
    for name, weight in adapter.read(plain.path / "adapter").weights.items():
        torch.testing.assert_close(adapter.read(compiled.path / "adapter").weights[name], weight, rtol=1e-4, atol=1e-6)
    whole = learned(compiled)
    (compiled.path / "complete").unlink()
    shutil.rmtree(compiled.path / "adapter")
    shutil.rmtree(compiled.path / "step-000002")
    assert learned(train(params, tmp_path / "b")) == whole


def test_a_missing_optional_package_is_a_one_line_error(tiny_base, tmp_path):
    with pytest.raises(UserError, match=r"train\.optimizer: adamw_8bit needs bitsandbytes"):
        train(tiny_params(tiny_base, optimizer="adamw_8bit"), tmp_path)


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(tiny_base, tmp_path, monkeypatch):
    """The same global batch in one process and in two that `accelerate launch` starts: the same losses."""
    params = tiny_params(tiny_base, max_steps=2, batch_size=2, scale_lr=False)
    one = train(params, tmp_path, "one")
    halved = tiny_params(tiny_base, max_steps=2, batch_size=1, scale_lr=False, launch={"num_processes": 2})
    (tmp_path / "params.json").write_text(halved.model_dump_json())
    (tmp_path / "two.py").write_text(
        "from pathlib import Path\n"
        "from customdiff.training import trainer\n"
        "from customdiff.config import Params\n"
        "from customdiff.tracking import Tracker\n"
        "params = Params.model_validate_json(Path('params.json').read_text())\n"
        "trainer.run(params, Path('prepared'), Path('two'), lambda run_id: Tracker())\n"
    )
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        launch.command(halved.train, "two.py"), check=True, env=environment, capture_output=True, timeout=300
    )
    (run,) = (tmp_path / "two").iterdir()
    assert json.loads((run / "identity.json").read_text())["processes"] == 2
    first, second = (
        np.genfromtxt(path / "steps.csv", delimiter=",", names=True)[["loss", "grad_norm"]].tolist()
        for path in (one.path, run)
    )
    np.testing.assert_allclose(second, first, rtol=1e-5)


def test_launching_is_not_interactive(tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = tiny_params(tiny_base, launch={"num_processes": 3})
    command = launch.command(params.train, "train.py")
    assert command[0] == sys.executable
    assert command[command.index("--num_processes") + 1] == "3"
    assert json.loads(Path(command[command.index("--config_file") + 1]).read_text())["num_machines"] == 1
    Path("nodes.yaml").write_text("num_machines: 2")
    own = launch.command(
        tiny_params(tiny_base, launch={"num_processes": 16, "config_file": "nodes.yaml"}).train, "train.py"
    )
    assert own[own.index("--num_processes") + 1] == "16"
    assert "--num_machines" not in own  # it would outdo the file's
    with pytest.raises(UserError, match=r"train\.launch\.config_file: nowhere\.yaml does not exist"):
        launch.command(
            tiny_params(tiny_base, launch={"num_processes": 3, "config_file": "nowhere.yaml"}).train, "train.py"
        )
