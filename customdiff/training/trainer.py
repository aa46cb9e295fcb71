"""Custom Diffusion training (Kumari et al. 2023, sections 3.1 and 3.2).

All random numbers of step n depend only on (base.seed, n). A killed run that continues from its last checkpoint
therefore ends with the same weights as an uninterrupted one, bit-identical on a CPU.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo.config as dynamo
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from customdiff import interrupts
from customdiff.adapters import adapter
from customdiff.config import Params, Train
from customdiff.errors import UserError
from customdiff.files import locked
from customdiff.models import attention, base, memory_efficient, methods, modifier_tokens
from customdiff.models.text import Text, encode_text, text_encoders
from customdiff.preparation import prepared_set
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.tracking import Tracker
from customdiff.training import run_log, step_log, validation
from customdiff.training.batches import Batches
from customdiff.training.checkpoints import Progress, RunFolder
from customdiff.training.identity import adapter_config, run_identity
from customdiff.training.launch import check_distributed_type
from customdiff.training.objective import losses, optimizer_for, target_of
from customdiff.training.selection import Grader, Selection
from customdiff.training.step_log import StepLog

COMPILATIONS = 64  # PyTorch's default limit of 8 is too low for four sizes of blocks and batches of several sizes
MEMORY_EFFICIENT_FROM = 256  # px; below this, memory-efficient layers are slower and save almost no memory


class Denoiser(nn.Module):
    """Text encoders and UNet as one module, so that Accelerate wraps them together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoders: Iterable[nn.Module]):
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, ids: list[Tensor], class_text: Text | None, time_ids: Tensor
    ) -> Tensor:
        """Predict noise or velocity for noisy latents (B, C, h, w).

        Args:
            timesteps: (B,) int64.
            ids: (I, L) int64 token ids of the instance captions, which come first in the batch, for each text encoder.
            class_text: B - I encoded class captions; None if B equals I.
            time_ids: (B, 6) fp32, SDXL's size and crop conditioning; other models ignore it.

        Returns:
            (B, C, h, w) in the dtype of the UNet.
        """
        text = encode_text(list(self.text_encoders), ids)
        if class_text is not None:
            text = text.followed_by(class_text)
        dtype = self.unet.dtype
        noisy = noisy.to(dtype, memory_format=torch.channels_last)
        added = {} if text.pooled is None else {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy, timesteps, text.states.to(dtype), added_cond_kwargs=added).sample


class Trained(NamedTuple):
    """The trained parameters: weights of the UNet, and the token embeddings of each text encoder."""

    weights: list[nn.Parameter]
    embeddings: list[nn.Parameter]


@dataclass
class Trainer:
    """Model, data, optimizer and settings of a run, and its training step."""

    pipe: DiffusionPipeline
    denoiser: nn.Module
    batches: Batches
    noise_scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    trained: list[nn.Parameter]
    train: Train
    accelerator: Accelerator

    @property
    def images_per_step(self) -> int:
        """Instance and class images in one optimizer step of all processes."""
        train = self.train
        per_batch = len(self.batches.sets) * train.batch_size * self.accelerator.num_processes
        return per_batch * train.gradient_accumulation_steps

    def step(self, number: int) -> dict[str, Tensor]:
        """Run optimizer step `number`, counted from 0.

        Returns:
            Losses of the last micro-batch and the gradient norm, scalars on the device.
        """
        train, accelerator = self.train, self.accelerator
        for micro in range(train.gradient_accumulation_steps):
            batch = self.batches.draw(number * train.gradient_accumulation_steps + micro)
            with accelerator.accumulate(self.denoiser):
                noisy = self.noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
                prediction = self.denoiser(noisy, batch.timesteps, batch.ids, batch.class_text, batch.time_ids)
                instance_loss, prior_loss = losses(prediction, target_of(self.noise_scheduler, batch), batch.mask)
                loss = instance_loss if prior_loss is None else instance_loss + train.prior_loss_weight * prior_loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained, train.max_grad_norm)
                self.optimizer.step()
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    self.schedule.step()
                self.optimizer.zero_grad(set_to_none=train.set_grads_to_none)
        metrics = {"loss": loss.detach(), "instance_loss": instance_loss.detach()}
        if prior_loss is not None:
            metrics["prior_loss"] = prior_loss.detach()
        if accelerator.num_processes > 1:
            metrics = {key: accelerator.reduce(value, "mean") for key, value in metrics.items()}
        return metrics | {"grad_norm": norm}


def run(
    params: Params,
    prepared: Path,
    runs: Path,
    tracker_for: Callable[[str | None], Tracker],
    grader: Grader | None = None,
) -> RunFolder:
    """Train on the prepared sets of all concepts, or continue an interrupted run with the same identity.

    Args:
        params: all of params.yaml.
        prepared: folder of the prepared sets, one per concept (data/prepared).
        runs: folder of the run folders, which DVC does not track.
        tracker_for: called in the main process with the id of the MLflow run to continue, or None.
        grader: grades checkpoints; needed if `train.select` or `train.patience` asks for grades.

    Returns:
        The run's folder with its adapter, steps.csv, metrics.json, performance.json and validation images.

    Raises:
        UserError: the base model, the prepared sets or the options are invalid or do not fit together.
    """
    accelerator = _accelerator(params)
    selection = Selection(params, grader if params.train.grades_checkpoints else None)
    identity = run_identity(params, prepared, accelerator.num_processes, grader)
    folder = RunFolder.of(runs, identity)
    with locked(folder.path) if accelerator.is_main_process else nullcontext():
        folder.open(identity, params.train, accelerator)
        if folder.is_complete(params.train):
            accelerator.print("the training is complete already; remove .checkpoints to repeat it")
            if accelerator.is_main_process and folder.run_id():
                with tracker_for(folder.run_id()) as tracker:  # a process that was killed has not ended its MLflow run
                    folder.save_run_id(tracker)
        else:
            _train(params, prepared, folder, tracker_for, selection, accelerator)
    return folder


def _train(
    params: Params,
    prepared: Path,
    folder: RunFolder,
    tracker_for: Callable[[str | None], Tracker],
    selection: Selection,
    accelerator: Accelerator,
) -> None:
    """Train from the last checkpoint of an open run folder, or from the start, and write the results to it."""
    train, checkpoint = params.train, folder.last_checkpoint()
    pipe, vae, scaling_factor = _load_base(params, accelerator.device)
    trained = _make_trainable(pipe, params, checkpoint)
    trainer = _trainer(params, _load_sets(params, prepared), pipe, vae, scaling_factor, trained, accelerator)

    tracker = tracker_for(folder.run_id()) if accelerator.is_main_process else Tracker()
    with tracker:
        folder.save_run_id(tracker)
        run_log.begin(tracker, params, prepared)
        log = StepLog(tracker, params.tracking.log_every, trainer.images_per_step)
        progress = Progress()
        if checkpoint:
            progress = folder.restore(checkpoint, trainer.optimizer, trainer.schedule, accelerator)
            log.rows, log.speeds, selection.measured = progress.rows, progress.speeds, progress.measured
            accelerator.print(f"continuing an interrupted run after step {progress.step}")
            missing = train.validation.due(progress.step) and not folder.has_images(params, progress.step)
            if missing and accelerator.is_main_process:
                validation.generate(pipe, params, folder, tracker, progress.step)
        seconds = _loop(trainer, progress, folder, log, selection)
        if accelerator.is_main_process:
            step = selection.selected_step
            last = adapter.from_pipeline(pipe, adapter_config(params, len(log.rows)))
            learned = adapter.read(folder.checkpoint(step)) if step else last
            summary = step_log.summary(log.rows, sum(parameter.numel() for parameter in trainer.trained))
            performance = step_log.performance(log, seconds)
            folder.finish(learned, log.rows, summary | selection.summary(), performance, train)
            run_log.end(tracker, params, prepared, folder, log.rows, seconds, selection.grades())
    accelerator.wait_for_everyone()


def _loop(trainer: Trainer, progress: Progress, folder: RunFolder, log: StepLog, selection: Selection) -> float:
    """Train to the last step, with checkpoints and validation images; returns the run's training time in seconds.

    A signal stops a single process after its step, with a checkpoint; several processes stop at once.

    Raises:
        Interrupted: by a signal.
        UserError: a loss or a weight is not finite.
    """
    train, accelerator, params = trainer.train, trainer.accelerator, selection.params
    first, is_main = progress.step, accelerator.is_main_process
    started = time.perf_counter()
    if is_main and first == 0 and train.validation.prompts:
        validation.generate(trainer.pipe, params, folder, log.tracker, 0)
    if selection.is_due(first) and not selection.is_graded(first):
        selection.grade(trainer.pipe, first, log.tracker, accelerator)
    log.restart_clock()
    with (
        tqdm(total=train.max_steps, initial=first, desc="train", unit="step", disable=not is_main) as bar,
        interrupts.deferred() if accelerator.num_processes == 1 else nullcontext(interrupts.Deferral()) as stop,
    ):
        for done in range(first + 1, train.max_steps + 1):
            if selection.is_over:
                accelerator.print(f"stopped after step {done - 1}: {train.patience} checkpoints without a better grade")
                break
            metrics = trainer.step(done - 1)
            log.add({"step": done, **metrics, "learning_rate": trainer.schedule.get_last_lr()[0]})
            bar.update()
            validate, grade = train.validation.due(done), selection.is_due(done)
            checkpoint = done % train.checkpointing_steps == 0 or done == train.max_steps or stop.requested
            if is_main and (validate or checkpoint):
                log.flush()
            if not log.pending:
                step_log.check_finite(log, trainer.trained, folder.last_checkpoint())
                bar.set_postfix(loss=f"{log.rows[-1]['loss']:.4f}", images_s=f"{log.speeds[-1]:.1f}")
            if is_main and validate and not stop.requested:
                with stop.during():
                    validation.generate(trainer.pipe, params, folder, log.tracker, done)
            if grade and not stop.requested:
                with stop.during():
                    selection.grade(trainer.pipe, done, log.tracker, accelerator)
            stopping = stop.requested
            if is_main and (checkpoint or stopping):
                seconds = progress.seconds + time.perf_counter() - started
                _save(trainer, Progress(done, seconds, log.rows, log.speeds, selection.measured), folder, selection)
            if stopping:
                break
            if validate or checkpoint:
                log.restart_clock()
        stop.check()
    accelerator.wait_for_everyone()
    return progress.seconds + time.perf_counter() - started


def _save(trainer: Trainer, progress: Progress, folder: RunFolder, selection: Selection) -> None:
    """Write a checkpoint, and remove those that are not kept."""
    learned = adapter.from_pipeline(trainer.pipe, adapter_config(selection.params, progress.step))
    grade = next((each.to_dict() for each in selection.grades() if each.step == progress.step), None)
    folder.save(progress, learned, trainer.optimizer, trainer.schedule, trainer.accelerator, grade)
    folder.prune(trainer.train.checkpoints_total_limit, keep=selection.selected_step)


def _accelerator(params: Params) -> Accelerator:
    device = base.device(params.base.device)
    if device.type == "cuda" and device.index is not None:
        if params.train.launch.num_processes > 1:
            raise UserError(
                f"base.device: {params.base.device} names one GPU, but train.launch.num_processes is "
                f"{params.train.launch.num_processes}; use auto or cuda"
            )
        torch.cuda.set_device(device)  # Accelerate has no argument for it and uses the current device
    accelerator = Accelerator(
        mixed_precision=params.train.mixed_precision,
        gradient_accumulation_steps=params.train.gradient_accumulation_steps,
        cpu=device.type == "cpu",
        # Weights are already in the compute dtype. Autocast would compute norms in fp32 and use a third more memory.
        kwargs_handlers=[AutocastKwargs(enabled=False)],
    )
    check_distributed_type(accelerator.distributed_type)
    set_seed(params.base.seed)
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # No uninitialized memory is read, so filling it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set at run time
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = params.train.allow_tf32
    return accelerator


def _load_sets(params: Params, prepared: Path) -> list[PreparedSet]:
    """The joined instance sets of all concepts and, with prior preservation, their joined class sets."""
    kinds = ["instance", "class"] if params.train.preserves_prior else ["instance"]
    return [
        prepared_set.join([prepared_set.load(prepared / name / kind) for name in params.concepts]) for kind in kinds
    ]


def _trainer(
    params: Params,
    sets: list[PreparedSet],
    pipe: DiffusionPipeline,
    vae: AutoencoderKL | None,
    scaling_factor: float,
    trained: Trained,
    accelerator: Accelerator,
) -> Trainer:
    train = params.train
    batches = Batches(sets, pipe, vae, scaling_factor, params, accelerator)
    optimizer = optimizer_for(train, trained.weights, trained.embeddings, accelerator.num_processes)
    schedule = get_scheduler(
        train.lr_scheduler,
        optimizer,
        num_warmup_steps=train.lr_warmup_steps,
        num_training_steps=train.max_steps,
    )
    encoders = [encoder.train() for _, encoder in text_encoders(pipe).values()]
    # In train mode diffusers copies the input of each shortcut out of channels_last, and without dropout the mode has
    # no other effect on the UNet. The encoders need train mode for gradient checkpointing.
    pipe.unet.train(pipe.unet.config.dropout > 0)
    if params.prepare.resolution >= MEMORY_EFFICIENT_FROM:
        memory_efficient.convert(pipe.unet, transformers=not train.compile)
    if train.compile:
        _compile(pipe.unet)
    denoiser, optimizer = accelerator.prepare(Denoiser(pipe.unet, encoders), optimizer)
    return Trainer(
        pipe=pipe,
        denoiser=denoiser,
        batches=batches,
        noise_scheduler=DDPMScheduler.from_config(pipe.scheduler.config),
        optimizer=optimizer,
        schedule=schedule,
        trained=[*trained.weights, *trained.embeddings],
        train=train,
        accelerator=accelerator,
    )


def _compile(unet: UNet2DConditionModel) -> None:
    """Compile the transformer blocks, once for each size of block and batch."""
    if unet.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cl"))):
        raise UserError("train.compile: needs a C++ compiler on a CPU; install g++ or set it to false")
    dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
    unet.compile_repeated_blocks(fullgraph=True)


def _load_base(params: Params, device: torch.device) -> tuple[DiffusionPipeline, AutoencoderKL | None, float]:
    """The base model in the compute dtype, a VAE in fp32 if pixels must be encoded, and the latents' scale.

    The VAE of SDXL overflows in fp16 (`force_upcast`); in fp32 the latents are also those that `prepare` caches.
    """
    train = params.train
    dtype = base.DTYPES[train.mixed_precision]
    samples = bool(train.validation.prompts) or train.grades_checkpoints
    vae_config = AutoencoderKL.load_config(params.base.model, subfolder="vae", revision=params.base.revision)
    parts = {} if samples else {"vae": None}
    pipe = base.load_pipeline(params.base, dtype=dtype, device=device, **parts)
    attention.use_backend(pipe.unet, train.attention)
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        for _, encoder in text_encoders(pipe).values():
            encoder.gradient_checkpointing_enable()
    if samples:
        pipe.vae.requires_grad_(False)
    vae = None if params.prepare.cache_latents else base.load_part(params.base, "vae", AutoencoderKL, device=device)
    return pipe, vae, vae_config.get("scaling_factor", 0.18215)


def _make_trainable(pipe: DiffusionPipeline, params: Params, checkpoint: Path | None) -> Trained:
    """Inject modifier tokens and the method's weights, freeze the rest, and load a checkpoint's weights."""
    train = params.train
    saved = adapter.read(checkpoint) if checkpoint else None
    embeddings = {
        concept.modifier_token: saved.embeddings[concept.modifier_token]
        if saved
        else modifier_tokens.initial_embedding(pipe, concept.initializer_token or concept.class_prompt)
        for concept in params.concepts.values()
    }
    for _, encoder in text_encoders(pipe).values():
        encoder.requires_grad_(False)
    layers = modifier_tokens.add_tokens(pipe, embeddings).values()
    for layer in layers:
        layer.trained.requires_grad_(methods.trains_tokens(train))
    weights = methods.inject(pipe.unet, train, train.attention)
    if saved:
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved.weights[name])
    trained_embeddings = [layer.trained.weight for layer in layers if layer.trained.weight.requires_grad]
    return Trained(list(weights.values()), trained_embeddings)
