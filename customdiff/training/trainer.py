"""Custom Diffusion training (paper, sections 3.1 and 3.2): few weights, few images, a prior to preserve.

Everything random in step n follows from (base.seed, n) alone. A run that was killed therefore continues from its last
checkpoint to the same weights, bit for bit on a CPU, as one that was not.
"""

import os
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import accelerate
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm.auto import tqdm

from customdiff.adapters import adapter
from customdiff.config import Params, Train
from customdiff.errors import UserError
from customdiff.files import sha256
from customdiff.models import attention, base, memory_efficient, methods, modifier_tokens
from customdiff.models.base import Text
from customdiff.preparation import prepared_set
from customdiff.preparation.prepared_set import PreparedSet
from customdiff.tracking import Tracker
from customdiff.training.checkpoints import RunFolder

LIGHTEN_FROM = 256  # px; at 64 px a lightened UNet costs 6 % in time or more, and saves 11 MB


class Denoiser(nn.Module):
    """Text encoders and UNet as one module, so that accelerate wraps, shards and autocasts them together."""

    def __init__(self, unet: nn.Module, text_encoders: Iterable[nn.Module]):
        super().__init__()
        self.unet = unet
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(
        self, noisy: Tensor, timesteps: Tensor, ids: list[Tensor], class_text: Text | None, time_ids: Tensor
    ) -> Tensor:
        """Predict noise or velocity for noisy latents (B, C, h, w).

        Args:
            timesteps: (B,) int64.
            ids: (I, L) token ids of the instance captions, which come first in the batch, for each text encoder.
            class_text: text states of the class captions, computed beforehand; None where B is I.
            time_ids: (B, 6), SDXL's size and crop conditioning; no other model reads it.
        """
        text = base.encode_text(self.text_encoders, ids)
        if class_text is not None:
            text = text.followed_by(class_text)
        dtype = self.unet.dtype
        noisy = noisy.to(dtype, memory_format=torch.channels_last)
        added = {} if text.pooled is None else {"text_embeds": text.pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy, timesteps, text.states.to(dtype), added_cond_kwargs=added).sample


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch: I instance images, then as many class images where there is a prior."""

    latents: Tensor  # (B, C, h, w) fp32, scaled
    noise: Tensor  # (B, C, h, w) fp32, standard normal
    timesteps: Tensor  # (B,) int64
    mask: Tensor  # (I, 1, h, w) fp32, 1 on the valid region
    ids: list[Tensor]  # (I, L) int64 for each text encoder
    class_text: Text | None  # of B - I captions
    time_ids: Tensor  # (B, 6) fp32: height and width of the photo, top and left of the crop, height and width here


class Batches:
    """Draws the batches of a run from its prepared sets; batch n is a function of the seed and n."""

    def __init__(
        self,
        sets: list[PreparedSet],
        pipe: DiffusionPipeline,
        vae: AutoencoderKL | None,
        scaling_factor: float,
        params: Params,
        accelerator: Accelerator,
    ):
        """`sets`: the instance set, and the class set where there is a prior to preserve."""
        self.sets = sets
        self.vae, self.scaling_factor = vae, scaling_factor
        self.seed, self.batch_size = params.base.seed, params.train.batch_size
        self.num_timesteps = pipe.scheduler.config.num_train_timesteps
        self.processes, self.rank, self.device = (
            accelerator.num_processes,
            accelerator.process_index,
            accelerator.device,
        )
        self.target_size = torch.tensor([params.prepare.resolution] * 2)
        self.ids = [ids.to(self.device) for ids in base.token_ids(pipe, sets[0].captions)]
        if len(sets) > 1:
            # Class captions hold no modifier token, so their states are the same at every step.
            unique = sorted(set(sets[1].captions))
            with torch.no_grad():  # a few at a time, for what is freed again still counts in the peak of memory
                first, *others = (base.text_of(pipe, unique[at : at + 16]) for at in range(0, len(unique), 16))
            self.class_text = first.followed_by(*others)
            places = {caption: place for place, caption in enumerate(unique)}
            self.class_place = torch.tensor([places[caption] for caption in sets[1].captions])

    def draw(self, number: int) -> Batch:
        """Micro-batch `number` of the run, counted from 0: this process's part of the global batch."""
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        size = self.batch_size * self.processes
        chosen = [
            prepared_set.batch_indices(len(one), size, self.seed + kind, number)[mine]
            for kind, one in enumerate(self.sets)
        ]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        drawn = [
            self._draw_set(one, index, mine, size, generator) for one, index in zip(self.sets, chosen, strict=True)
        ]
        clean, noise, timesteps, time_ids = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return Batch(
            latents=clean,
            noise=noise,
            timesteps=timesteps,
            mask=self._to_device(self.sets[0].mask[chosen[0]].float()),
            ids=[ids[chosen[0]] for ids in self.ids],
            class_text=self.class_text.rows(self.class_place[chosen[1]]) if len(chosen) > 1 else None,
            time_ids=time_ids,
        )

    def _draw_set(self, prepared: PreparedSet, index: list[int], mine: slice, size: int, generator: torch.Generator):
        """Latents, noise, timesteps and framing of one set; all processes draw the global batch and keep their part."""
        mean, std = self._moments(prepared, index)
        posterior, noise = torch.randn(2, size, *mean.shape[1:], generator=generator)[:, mine]
        timesteps = torch.randint(0, self.num_timesteps, (size,), generator=generator)[mine]
        clean = prepared_set.sample(mean, std, self.scaling_factor, posterior)
        time_ids = torch.cat([prepared.framing[index], self.target_size.expand(len(index), 2)], 1).float()
        return [self._to_device(x) for x in (clean, noise, timesteps, time_ids)]

    def _to_device(self, x: Tensor) -> Tensor:
        """A tensor on the device; to a GPU out of pinned memory, so that the loop goes on while it is copied."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _moments(self, prepared: PreparedSet, index: list[int]) -> tuple[Tensor, Tensor]:
        if prepared.pixels is None:
            return prepared.mean[index], prepared.std[index]
        return prepared_set.encode(self.vae, prepared_set.to_pixels(prepared.pixels[index]))


def losses(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Instance loss over the valid region, and prior loss over the class images behind the instance images.

    Args:
        prediction, target: (B, C, h, w), any dtype; compared in fp32.
        mask: (I, 1, h, w), I <= B.

    Returns:
        Two scalars. The instance loss is summed over channels and averaged over valid pixels, the prior loss is
        averaged over both, as in the paper's and the reference's code: the first weighs C times more. None without
        class images.
    """
    count = mask.shape[0]
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    instance = ((error[:count] * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    return instance, error[count:].mean() if error.shape[0] > count else None


def target_of(scheduler: DDPMScheduler, batch: Batch) -> Tensor:
    """What the model should predict, by the scheduler's own configuration: noise, or velocity (SD 2.x)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return batch.noise
    if kind == "v_prediction":
        return scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    raise UserError(f"base.model: its scheduler predicts {kind!r}; epsilon and v_prediction can be trained")


def learning_rate(train: Train, num_processes: int) -> float:
    """The optimizer's rate: `scale_lr` multiplies as the reference does, and by 2 for the class images in a batch."""
    if not train.scale_lr:
        return train.learning_rate
    factor = train.gradient_accumulation_steps * train.batch_size * num_processes
    return train.learning_rate * factor * (2 if train.preserves_prior else 1)


def optimizer_for(
    train: Train, weights: Iterable[nn.Parameter], rows: Iterable[nn.Parameter], rate: float
) -> torch.optim.Optimizer:
    """AdamW over the UNet's trained weights and the token rows.

    Rows do not decay: the reference decays the whole token table, and shrinks every word a little at each step.
    """
    groups = [
        {"params": list(weights), "weight_decay": train.adam_weight_decay},
        {"params": list(rows), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": rate, "betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("train.optimizer: adamw_8bit needs bitsandbytes; install customdiff[adam8bit]") from error
        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


@dataclass
class Log:
    """Figures of each step. They stay on the device until a line is due, so that the loop never waits for them."""

    tracker: Tracker
    every: int
    images_a_step: int
    rows: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(self, row: dict) -> None:
        """Take a step's figures, tensors or numbers; write them once `every` steps have come together."""
        self.pending.append(row)
        if len(self.pending) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what has come together, with the speed since `restart_clock` or the last flush."""
        if not self.pending:
            return
        figures = [
            {key: value if key == "step" else float(value) for key, value in row.items()} for row in self.pending
        ]
        seconds = time.perf_counter() - self.started
        shared = {
            "images_per_second": self.images_a_step * len(self.pending) / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        for row in figures:
            self.rows.append(row | shared)
            self.tracker.metrics({k: v for k, v in self.rows[-1].items() if k != "step"}, step=row["step"])
        self.pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the speed whatever was done since the last step: validation images, a checkpoint."""
        self.started = time.perf_counter()


class Trained(NamedTuple):
    """The parameters that train: of the UNet, and the rows of the modifier tokens in each text encoder."""

    weights: list[nn.Parameter]
    rows: list[nn.Parameter]


@dataclass
class Learner:
    """All that a training step needs."""

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
    def images_a_step(self) -> int:
        """Instance and class images in one optimizer step of all processes."""
        train = self.train
        per_batch = len(self.batches.sets) * train.batch_size * self.accelerator.num_processes
        return per_batch * train.gradient_accumulation_steps

    def step(self, number: int) -> dict[str, Tensor]:
        """Optimizer step `number`, counted from 0, over all its micro-batches; figures of the last of them."""
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
        figures = {"loss": loss.detach(), "instance_loss": instance_loss.detach()}
        if prior_loss is not None:
            figures["prior_loss"] = prior_loss.detach()
        if accelerator.num_processes > 1:
            figures = {key: accelerator.reduce(value, "mean") for key, value in figures.items()}
        return figures | {"grad_norm": norm}


def run(params: Params, prepared: Path, runs: Path, tracker_for: Callable[[str | None], Tracker]) -> RunFolder:
    """Train on the prepared sets of all concepts, continuing a killed run of the very same kind where there is one.

    Args:
        params: all of params.yaml.
        prepared: folder of the prepared sets, one a concept (data/prepared).
        runs: where run folders with their checkpoints lie, out of DVC's reach.
        tracker_for: called in the main process with the id of the tracked run to continue, or None.

    Returns:
        The run's folder with its adapter, steps.csv, metrics.json and validation images.

    Raises:
        UserError: the base model, the prepared sets or the options do not go together.
    """
    train = params.train
    accelerator = _accelerator(params)
    folder = RunFolder.open(runs, run_identity(params, prepared, accelerator.num_processes), accelerator)
    checkpoint = folder.last_checkpoint()
    pipe, vae, scaling_factor = _load_base(params, accelerator.device)
    trained = _make_trainable(pipe, params, checkpoint)
    learner = _learner(params, _load_sets(params, prepared), pipe, vae, scaling_factor, trained, accelerator)

    tracker = tracker_for(folder.run_id()) if accelerator.is_main_process else Tracker()
    with tracker:
        folder.remember(tracker)
        tracker.params(params)
        log = Log(tracker, params.tracking.log_every, learner.images_a_step)
        first = 0
        if checkpoint:
            first, log.rows = folder.restore(checkpoint, learner.optimizer, learner.schedule, accelerator)
            accelerator.print(f"continuing after step {first} of a run that was interrupted")
        seconds = _loop(learner, first, params, folder, log)
        if accelerator.is_main_process:
            learned = adapter.from_pipeline(pipe, _card(params))
            summary = _summary(log.rows, seconds, learner.trained)
            folder.finish(learned, log.rows, summary)
            tracker.metrics({f"train/{key}": value for key, value in summary.items()}, step=train.max_steps)
    accelerator.wait_for_everyone()
    return folder


def _loop(learner: Learner, first: int, params: Params, folder: RunFolder, log: Log) -> float:
    """Steps `first` to the last, with checkpoints and validation images; returns the seconds they took."""
    train, accelerator = params.train, learner.accelerator
    bar = tqdm(total=train.max_steps, initial=first, desc="train", unit="step", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    log.restart_clock()
    for done in range(first + 1, train.max_steps + 1):
        figures = learner.step(done - 1)
        log.add({"step": done, **figures, "learning_rate": learner.schedule.get_last_lr()[0]})
        bar.update()
        if not log.pending:
            bar.set_postfix(loss=f"{log.rows[-1]['loss']:.4f}", images_s=f"{log.rows[-1]['images_per_second']:.1f}")
        validate = bool(train.validation.prompts) and done % train.validation.every == 0
        checkpoint = done % train.checkpointing_steps == 0 or done == train.max_steps
        if accelerator.is_main_process and (validate or checkpoint):
            log.flush()
            if validate:
                _validate(learner.pipe, params, folder, log.tracker, done)
            if checkpoint:
                learned = adapter.from_pipeline(learner.pipe, _card(params))
                folder.save(done, learned, learner.optimizer, learner.schedule, accelerator, log.rows)
                folder.prune(train.checkpoints_total_limit)
            log.restart_clock()
    bar.close()
    accelerator.wait_for_everyone()
    return time.perf_counter() - started


def _accelerator(params: Params) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=params.train.mixed_precision,
        gradient_accumulation_steps=params.train.gradient_accumulation_steps,
        cpu=base.device(params.base.device).type == "cpu",
        # Weights are in the compute dtype already; autocast would take norms in fp32 and keep a third more.
        kwargs_handlers=[AutocastKwargs(enabled=False)],
    )
    set_seed(params.base.seed)
    if accelerator.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what was not written
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = params.train.allow_tf32
    return accelerator


def _load_sets(params: Params, prepared: Path) -> list[PreparedSet]:
    """Instance sets of all concepts as one, and their class sets as another where there is a prior to preserve."""
    kinds = ["instance", "class"] if params.train.preserves_prior else ["instance"]
    return [
        prepared_set.join([prepared_set.load(prepared / name / kind) for name in params.concepts]) for kind in kinds
    ]


def _learner(params, sets, pipe, vae, scaling_factor, trained: Trained, accelerator) -> Learner:
    train = params.train
    batches = Batches(sets, pipe, vae, scaling_factor, params, accelerator)
    rate = learning_rate(train, accelerator.num_processes)
    optimizer = optimizer_for(train, trained.weights, trained.rows, rate)
    schedule = get_scheduler(
        train.lr_scheduler,
        optimizer,
        num_warmup_steps=train.lr_warmup_steps,
        num_training_steps=train.max_steps,
    )
    encoders = [encoder.train() for _, encoder in base.text_encoders(pipe).values()]
    # In train mode diffusers turns the input of each shortcut out of channels_last, and there is nothing else in it
    # for a UNet without dropout; the encoders need it for gradient checkpointing.
    pipe.unet.train(pipe.unet.config.dropout > 0)
    if params.prepare.resolution >= LIGHTEN_FROM:
        memory_efficient.lighten(pipe.unet, transformers=not train.compile)
    if train.compile:
        _compile(pipe.unet)
    denoiser, optimizer = accelerator.prepare(Denoiser(pipe.unet, encoders), optimizer)
    return Learner(
        pipe=pipe,
        denoiser=denoiser,
        batches=batches,
        noise_scheduler=DDPMScheduler.from_config(pipe.scheduler.config),
        optimizer=optimizer,
        schedule=schedule,
        trained=[*trained.weights, *trained.rows],
        train=train,
        accelerator=accelerator,
    )


def _compile(unet: nn.Module) -> None:
    """Have the transformer blocks compiled: they are many and alike, so one of each size is compiled for all."""
    if unet.device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "cl"))):
        raise UserError("train.compile: needs a C++ compiler on a CPU; install g++, or set it to false")
    unet.compile_repeated_blocks(fullgraph=True)


def peak_memory_mb() -> float:
    """Peak memory so far, MB: of the GPU's allocator, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def run_identity(params: Params, prepared: Path, num_processes: int) -> dict:
    """Everything that shapes the weights of a run. Two runs with the same identity end with the same weights."""
    files = [path for name in params.concepts for path in sorted((prepared / name).iterdir())]
    return {
        "base": params.base.model_dump() | {"weights": base.weight_hashes(params.base)},
        "concepts": {name: concept.model_dump(exclude={"source"}) for name, concept in params.concepts.items()},
        "train": params.train.model_dump(
            exclude={"validation", "launch", "checkpointing_steps", "checkpoints_total_limit"}
        ),
        "processes": num_processes,
        "prepared": {str(path.relative_to(prepared)): sha256(path) for path in files},
        "versions": _versions(),
    }


def _load_base(params: Params, device: torch.device) -> tuple[DiffusionPipeline, AutoencoderKL | None, float]:
    """The base model in the compute dtype; the VAE only where something will need it."""
    train = params.train
    dtype = base.DTYPES[train.mixed_precision]
    needs_vae = bool(train.validation.prompts) or not params.prepare.cache_latents
    vae_config = AutoencoderKL.load_config(params.base.model, subfolder="vae", revision=params.base.revision)
    parts = {} if needs_vae else {"vae": None}
    pipe = base.load_pipeline(params.base, dtype=dtype, device=device, **parts)
    attention.use_backend(pipe.unet, train.attention)
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        for _, encoder in base.text_encoders(pipe).values():
            encoder.gradient_checkpointing_enable()
    if needs_vae:
        pipe.vae.requires_grad_(False)
    return pipe, pipe.vae if needs_vae else None, vae_config.get("scaling_factor", 0.18215)


def _make_trainable(pipe: DiffusionPipeline, params: Params, checkpoint: Path | None) -> Trained:
    """Put modifier tokens and the method's weights in, freeze all else, and take over a checkpoint's weights."""
    how = params.train.how
    saved = adapter.read(checkpoint) if checkpoint else None
    rows = {
        concept.modifier_token: saved.rows[concept.modifier_token]
        if saved
        else modifier_tokens.initial_rows(pipe, concept.initializer_token or concept.class_prompt)
        for concept in params.concepts.values()
    }
    for _, encoder in base.text_encoders(pipe).values():
        encoder.requires_grad_(False)
    embeddings = modifier_tokens.add_tokens(pipe, rows).values()
    for embedding in embeddings:
        embedding.rows.requires_grad_(methods.trains_tokens(how))
    weights = methods.put(pipe.unet, how, params.train.attention)
    if saved:
        with torch.no_grad():
            for name, parameter in weights.items():
                parameter.copy_(saved.weights[name])
    trained_rows = [embedding.rows.weight for embedding in embeddings if embedding.rows.weight.requires_grad]
    return Trained(list(weights.values()), trained_rows)


def _validate(pipe: DiffusionPipeline, params: Params, folder: RunFolder, tracker: Tracker, step: int) -> None:
    """Draw the validation prompts with the weights as they are, from the same seeds every time."""
    from customdiff.models import sampling

    settings = params.train.validation
    prompts = [prompt for prompt in settings.prompts for _ in range(settings.num_images)]
    training = pipe.unet.training
    pipe.unet.eval()
    images = sampling.generate(
        pipe,
        prompts,
        [params.base.seed + number for number in range(len(prompts))],
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        batch_size=settings.num_images,
        height=params.prepare.resolution,
        width=params.prepare.resolution,
        progress=None,
    )
    pipe.unet.train(training)
    for number, image in enumerate(images):
        name = f"prompt{number // settings.num_images}-{number % settings.num_images}"
        folder.add_image(image, f"step{step:06d}-{name}.png")
        tracker.image(image, name, step=step)


def _card(params: Params) -> dict:
    return {
        "base": {
            "model": params.base.model,
            "revision": params.base.revision,
            "variant": params.base.variant,
        },
        "concepts": {
            name: {
                "modifier_token": concept.modifier_token,
                "initializer": concept.initializer_token or concept.class_prompt,
                "class_prompt": concept.class_prompt,
                "instance_prompt": concept.instance_prompt,
            }
            for name, concept in params.concepts.items()
        },
        **params.train.how,
        "resolution": params.prepare.resolution,
        "steps": params.train.max_steps,
        "seed": params.base.seed,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    libraries = (torch, diffusers, transformers, accelerate)
    return {"python": platform.python_version()} | {library.__name__: library.__version__ for library in libraries}


def _summary(rows: list[dict], seconds: float, trained: list[nn.Parameter]) -> dict:
    """Figures of the whole run; the losses are means over its last tenth, since those of single steps scatter."""
    last = rows[-max(1, len(rows) // 10) :]
    keys = [key for key in ("loss", "instance_loss", "prior_loss") if key in last[0]]
    return {f"final_{key}": sum(row[key] for row in last) / len(last) for key in keys} | {
        "steps": len(rows),
        "seconds": round(seconds, 2),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in rows), 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
    }
