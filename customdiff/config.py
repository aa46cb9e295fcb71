"""The schema of params.yaml: every key, its default, its unit and its range, and nowhere else.

Defaults are those of diffusers' reference script, with the paper's values where the two differ.
`load` checks the whole file before any work starts; a stage reads its own section from the result.
"""

import difflib
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from customdiff.errors import UserError

ConceptName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ParamsError(UserError):
    """params.yaml is wrong; the message has one line for each wrong key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Base(Section):
    """The model that is personalized."""

    model: str = Field("data/base", min_length=1, description="a diffusers pipeline folder, or a Hub repository")
    revision: str | None = Field(None, description="Hub branch, tag or commit")
    variant: str | None = Field(None, description="weight variant of the files, such as fp16")
    seed: int = Field(42, ge=0, lt=2**32, description="every random draw of every stage flows from it")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto: a GPU where there is one")


class Source(Section):
    """Where a concept's instance images come from: exactly one of `path`, `url` and `hub`."""

    path: str | None = Field(None, description="a folder of images, or a zip or tar archive")
    url: str | None = Field(None, pattern=r"^https://", description="https address of a zip or tar archive")
    hub: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="Hugging Face data set, owner/name")
    revision: str | None = Field(None, description="branch, tag or commit of `hub`")
    split: str = Field("train", description="split of `hub`")
    subfolder: str | None = Field(None, description="the images' folder inside the archive or folder")
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$", description="checked when given; archives only")

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        named = [name for name in ("path", "url", "hub") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"give exactly one of path, url and hub (here: {', '.join(named) or 'none'})")
        return self


class Concept(Section):
    """One subject to learn. The first four keys are required, since stages depend on them one by one."""

    source: Source
    modifier_token: str = Field(pattern=r"^\S+$", description="the new word that will mean this subject")
    class_prompt: str = Field(min_length=1, description="what the subject is one of: `cat`; queries class images")
    instance_prompt: str = Field(description="caption of an instance image; {} stands for the modifier token")
    initializer_token: str | None = Field(
        None,
        min_length=1,
        description="word whose embedding the token starts from; null: the class_prompt's words",
    )

    @field_validator("instance_prompt")
    @classmethod
    def _has_placeholder(cls, prompt: str) -> str:
        if prompt.count("{}") != 1:
            raise ValueError("must hold {} once, where the modifier token goes, as in 'photo of a {} cat'")
        return prompt

    @property
    def caption(self) -> str:
        """The instance prompt with the modifier token in it: `photo of a <new1> cat`."""
        return self.instance_prompt.format(self.modifier_token)


class Download(Section):
    """download-data: limits on what is taken in; downloads are untrusted."""

    minimum: int = Field(4, ge=1, description="fewer good instance images than this is an error")
    maximum: int = Field(100, ge=1, description="more images than this are refused: they are hardly one subject")
    max_megapixels: float = Field(64, gt=0, description="of one image, checked before it is decoded")
    max_megabytes: float = Field(1024, gt=0, description="of an archive, packed and unpacked alike")
    max_side: int = Field(2048, ge=64, description="px; larger images are scaled down to it when stored")
    timeout: float = Field(30, gt=0, description="s without an answer before a download is given up")


class Index(Section):
    """backend index: clip-retrieval over a pool of captioned images."""

    pool: str = Field("data/pool", description="folder of images with .txt captions, or of webdataset tars")
    clip: str = Field("data/clip", description="CLIP folder or Hub repository that embeds pool and query")


class Service(Section):
    """backend service: a clip-retrieval HTTP service (`clip-retrieval back`)."""

    url: str = Field("http://127.0.0.1:1234/knn-service", pattern=r"^https?://", description="of its knn-service")
    index_name: str = Field("laion5B-L-14", description="index that the service should search")
    timeout: float = Field(20, gt=0, description="s")
    retries: int = Field(3, ge=0, description="per request, with growing pauses")
    parallel: int = Field(8, ge=1, le=64, description="image downloads at a time")


class Generate(Section):
    """backend generate: the base model draws the class images from the class prompt."""

    steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    batch_size: int = Field(4, ge=1)
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="the reference's prior_generation_precision")


class Retrieve(Section):
    """retrieve-class-images: the real images that keep the class what it was (prior preservation)."""

    backend: Literal["index", "service", "generate", "folder"] = "index"
    num_class_images: int = Field(200, ge=1)
    minimum: int = Field(50, ge=1, description="fewer found than this is an error; between the two a warning")
    duplicate_similarity: Fraction = Field(0.98, description="cosine at and above which two images are one")
    caption_weight: Fraction = Field(
        0.0, description="backend index: the caption's share in the ranking; 0: the image alone, as in the reference"
    )
    index: Index = Index()
    service: Service = Service()
    generate: Generate = Generate()
    folder: str = Field("data/class-images/{}", description="backend folder: images with .txt captions; {}: concept")

    @model_validator(mode="after")
    def _minimum_fits(self) -> "Retrieve":
        if self.minimum > self.num_class_images:
            raise ValueError(f"minimum ({self.minimum}) is above num_class_images ({self.num_class_images})")
        return self


class Prepare(Section):
    """prepare: captions, the paper's views of each instance image, and their VAE moments."""

    resolution: int = Field(512, ge=32, multiple_of=8, description="px, height and width; 768 for SD 2.x, 64 embedded")
    captions: Literal["template", "sidecar", "blip"] = Field(
        "template", description="instance_prompt; a .txt beside each image ({} for the token); or a captioner"
    )
    captioner: str = Field("Salesforce/blip-image-captioning-base", description="captions: blip; folder or Hub name")
    class_captions: Literal["real", "prompt"] = Field("real", description="the reference's real_prior: captions found")
    augmentation: bool = Field(True, description="the paper's random resizing; false is the reference's noaug")
    hflip: bool = Field(False, description="flip half of the views left to right")
    center_crop: bool = Field(False, description="else the crop of a non-square image is random")
    views: int = Field(40, ge=1, description="draws of crop, flip and resizing kept of each instance image")
    class_views: int = Field(1, ge=1, description="draws of crop and flip kept of each class image")
    cache_latents: bool = Field(True, description="false: pixels are kept, and the VAE encodes at every step")
    batch_size: int = Field(4, ge=1, description="images that the VAE encodes at a time")


class Validation(Section):
    """Images drawn while training."""

    prompts: list[str] = Field([], description="with modifier tokens written out; none: no validation images")
    num_images: int = Field(2, ge=1, description="a prompt")
    every: int = Field(50, ge=1, description="steps")
    steps: int = Field(25, ge=1, description="sampler steps")
    guidance_scale: float = Field(6.0, ge=0)


class Launch(Section):
    """How `train` is started: in this process, or in several by `accelerate launch`."""

    num_processes: int = Field(1, ge=1)
    config_file: str | None = Field(None, description="an accelerate config; null: its default, written unasked")


class Train(Section):
    """train: Custom Diffusion (sections 3.1 and 3.2 of the paper), or a baseline to compare it with."""

    method: Literal["custom_diffusion", "textual_inversion", "lora"] = Field(
        "custom_diffusion", description="textual_inversion: tokens alone; lora: DreamBooth with low-rank attention"
    )
    freeze_model: Literal["crossattn_kv", "crossattn"] = Field(
        "crossattn_kv",
        description="what trains: cross-attention keys and values, or all of cross-attention (faces)",
    )
    lora_rank: int = Field(4, ge=1, description="method lora: rank of the change of each projection")
    max_steps: int = Field(250, ge=1, description="optimizer steps")
    batch_size: int = Field(2, ge=1, description="instance images a step and process; as many class images beside")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    scale_lr: bool = Field(True, description="times batch_size, accumulation, processes, and 2 with class images")
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    lr_warmup_steps: int = Field(0, ge=0)
    with_prior_preservation: bool = True
    prior_loss_weight: float = Field(1.0, ge=0)
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit needs the extra adam8bit")
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    adam_weight_decay: float = Field(1e-2, ge=0, description="of the attention weights; token rows never decay")
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile of the transformer blocks: a slow start, then faster steps")
    set_grads_to_none: bool = True
    attention: Literal["sdpa", "xformers"] = Field("sdpa", description="xformers needs the extra of that name")
    checkpointing_steps: int = Field(250, ge=1, description="steps between checkpoints that a killed run resumes from")
    checkpoints_total_limit: int | None = Field(None, ge=1, description="older ones are removed")
    validation: Validation = Validation()
    launch: Launch = Launch()

    @property
    def preserves_prior(self) -> bool:
        """Whether class images train beside the instance images; textual inversion changes nothing they could keep."""
        return self.with_prior_preservation and self.method != "textual_inversion"


class Evaluate(Section):
    """evaluate: text and image alignment of the adapter and of the base model (section 4 of the paper)."""

    prompts: str = Field(
        "data/prompts", description="folder of <class>.txt, else default.txt; {} stands for the subject"
    )
    num_images: int = Field(4, ge=1, description="a prompt")
    batch_size: int = Field(8, ge=1, description="images drawn at a time")
    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "euler", "base"] = Field(
        "ddim", description="base: the model's own"
    )
    steps: int = Field(100, ge=1)
    guidance_scale: float = Field(6.0, ge=0)
    eta: Fraction = Field(1.0, description="noise of ddim; other schedulers ignore it")
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    clip: str = Field("openai/clip-vit-base-patch32", description="the judge: CLIP folder or Hub repository")
    bootstrap: int = Field(2000, ge=100, description="resamples over prompts for the 95 % intervals")


class Tracking(Section):
    """MLflow. MLFLOW_TRACKING_URI, if set, goes before the local store mlflow.db."""

    enabled: bool = True
    experiment: str = Field("customdiff", min_length=1)
    log_every: int = Field(10, ge=1, description="steps")


class Params(Section):
    """All of params.yaml."""

    base: Base = Base()
    concepts: dict[ConceptName, Concept] = Field(min_length=1)
    download: Download = Download()
    retrieve: Retrieve = Retrieve()
    prepare: Prepare = Prepare()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _distinct_tokens(self) -> "Params":
        tokens = [concept.modifier_token for concept in self.concepts.values()]
        for token in tokens:
            if tokens.count(token) > 1:
                raise ValueError(f"concepts: modifier_token {token} is used twice; give each concept its own")
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check a params file as a whole.

    Raises:
        ParamsError: the file is missing, is not YAML, or has unknown keys or values out of range.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(
            f"{path}: cannot be read ({error}); run in the project folder, or `customdiff preset`"
        ) from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: must hold sections such as base:, concepts: and train:")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from error


def with_num_images(params: Params, num_images: int | None) -> Params:
    """Parameters that evaluate with so many images a prompt; None leaves them as they are."""
    if num_images is None:
        return params
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"num_images": num_images})})


def concept(params: Params, name: str) -> Concept:
    """The concept of that name.

    Raises:
        ParamsError: there is none.
    """
    if name not in params.concepts:
        raise ParamsError(f"concepts: there is no {name}; params.yaml has {', '.join(params.concepts)}")
    return params.concepts[name]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, instead of the last one winning in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(problem: dict) -> str:
    """One line for one pydantic error: the key, what is wrong, what would be right."""
    *parents, key = problem["loc"] or ("",)
    where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(parents)
        near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        return f"{where}: unknown key; " + (f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}")
    if problem["type"] == "missing":
        return f"{where}: is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]} (here: {problem['input']!r})"


def _keys_at(parents: list) -> list[str]:
    """The keys that are valid inside the section at `parents`."""
    model = Params
    for part in parents:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = next(
                (a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Section)),
                annotation,
            )
    return list(model.model_fields)
