"""Section `train` of params.yaml: method, optimizer, precision, checkpoints and validation."""

from typing import Literal

from pydantic import Field, model_validator

from customdiff.config.section import Fraction, SamplerSteps, Section


class Validation(Section):
    """Images generated during training."""

    prompts: list[str] = Field(
        [],
        description="Prompts; {} stands for the subject of every concept in turn, such as <new1> cat. None: no images.",
    )
    num_images: int = Field(2, ge=1, description="Images per prompt and concept.")
    every: int = Field(50, ge=1, description="Steps between validations.")
    steps: SamplerSteps = Field(25, description="Sampler steps.")
    guidance_scale: float = Field(6.0, ge=0, description="Scale of classifier-free guidance.")

    def due(self, step: int) -> bool:
        """Whether images are generated after this step."""
        return bool(self.prompts) and step % self.every == 0


class Grading(Section):
    """Images by which checkpoints are graded during training, for `select: best` and `patience`."""

    prompts: list[str] = Field(
        ["a photo of a {} on the beach", "a {} in the snow", "a {} in front of a brick wall", "a painting of a {}"],
        min_length=1,
        description="Prompts, none of them of evaluate.prompts; {} stands for the subject.",
    )
    num_images: int = Field(1, ge=1, description="Images per prompt and concept.")
    steps: SamplerSteps = Field(25, description="Sampler steps.")
    guidance_scale: float = Field(6.0, ge=0, description="Scale of classifier-free guidance.")
    identity_weight: float = Field(1.0, ge=0, description="Weight of the subject's share in the harmonic mean.")
    text_weight: float = Field(1.0, ge=0, description="Weight of the share of text alignment.")
    tolerance: Fraction = Field(
        0.08,
        description="Scores that differ by less count as equal, and the latest checkpoint of equal ones is selected.",
    )

    @property
    def all_prompts(self) -> list[str]:
        """The prompt of each image of a concept."""
        return [prompt for prompt in self.prompts for _ in range(self.num_images)]

    @model_validator(mode="after")
    def _usable(self) -> "Grading":
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise ValueError(f"prompts: {prompt!r} has no {{}} for the subject")
        if not self.identity_weight + self.text_weight:
            raise ValueError("identity_weight and text_weight are both 0; at least one must be positive")
        return self


class Launch(Section):
    """How `train` is started: in one process, or in several by `accelerate launch`."""

    num_processes: int = Field(1, ge=1, description="Processes, one per GPU.")
    config_file: str | None = Field(
        None, description="Accelerate config file; null: Accelerate's default, written automatically."
    )


class Train(Section):
    """train: Custom Diffusion (sections 3.1 and 3.2 of the paper), or a baseline to compare it with."""

    method: Literal["custom_diffusion", "textual_inversion", "lora"] = Field(
        "custom_diffusion", description="textual_inversion: tokens only; lora: DreamBooth with low-rank attention."
    )
    freeze_model: Literal["crossattn_kv", "crossattn"] = Field(
        "crossattn_kv",
        description="What trains: keys and values of cross-attention, or all of cross-attention (faces).",
    )
    lora_rank: int = Field(4, ge=1, description="Rank of the change of each projection for method lora.")
    max_steps: int = Field(250, ge=1, description="Optimizer steps.")
    batch_size: int = Field(2, ge=1, description="Instance images per step and process, and as many class images.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    learning_rate: float = Field(1e-5, gt=0, description="Learning rate before `scale_lr`.")
    token_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of modifier tokens before `scale_lr`; null: learning_rate."
    )
    scale_lr: bool = Field(
        True, description="Multiply the rates by batch_size, accumulation, processes, and 2 with class images."
    )
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = Field("constant", description="Learning rate schedule.")
    lr_warmup_steps: int = Field(0, ge=0, description="Warm-up steps of the schedule.")
    with_prior_preservation: bool = Field(True, description="Train on class images as well.")
    prior_loss_weight: float = Field(1.0, ge=0, description="Weight of the prior loss.")
    mask_weight: Fraction = Field(
        1.0, description="Weight of the instance loss outside the subject's mask; 1: the same everywhere."
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit needs the extra adam8bit.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    adam_weight_decay: float = Field(1e-2, ge=0, description="Decay of attention weights; embeddings never decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm at which gradients are clipped.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="Precision of the frozen weights.")
    allow_tf32: bool = Field(False, description="TF32 matrix products on Ampere and later GPUs.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    compile: bool = Field(False, description="torch.compile of the transformer blocks: slow start, faster steps.")
    set_grads_to_none: bool = Field(True, description="Set gradients to None instead of zero, which saves memory.")
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="Attention kernel; xformers needs the extra xformers."
    )
    checkpointing_steps: int = Field(250, ge=1, description="Steps between checkpoints.")
    checkpoints_total_limit: int | None = Field(None, ge=1, description="Checkpoints to keep; null: all.")
    select: Literal["last", "best"] = Field(
        "last", description="Checkpoint that becomes the adapter: the last, or the one with the best grade."
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after this many checkpoints in a row without a better grade; null: never."
    )
    grading: Grading = Grading()
    validation: Validation = Validation()
    launch: Launch = Launch()

    @property
    def grades_checkpoints(self) -> bool:
        """Whether checkpoints are graded during training."""
        return self.select == "best" or self.patience is not None

    @property
    def preserves_prior(self) -> bool:
        """Whether class images are used; textual inversion changes no weights, so it has no prior to preserve."""
        return self.with_prior_preservation and self.method != "textual_inversion"
