"""One work folder for both sides of a measurement: base model, photos, class images, and each side's own settings."""

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from benchmarks.configs import BATCH_SIZE, CLASS, INSTANCE_PROMPT, MODIFIER_TOKEN, Config
from customdiff.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    """What both sides run on.

    Attributes:
        device: cpu or cuda.
        threads: of each process's arithmetic.
        precision: no (fp32), fp16 or bf16.
    """

    device: str
    threads: int
    precision: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process: our tree on its path, no network, no GPU where `device` is cpu."""
        settings = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**os.environ, **settings, **hidden}


@dataclass(frozen=True)
class Project:
    """A work folder: photos/, classes/ in the reference's layout, ours/ (a project of ours), reference/ (its output).

    Attributes:
        base: the base model's folder.
        steps: of a run.
        options: options of our side only, values by dotted key of params.yaml.
    """

    folder: Path
    base: Path
    config: Config
    machine: Machine
    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> Path:
        return self.folder / "ours"

    def run(self, side: str, *arguments: str, cwd: Path | None = None) -> None:
        """Run one side's process (`side.py`) to its end.

        Raises:
            UserError: it failed; its last lines are in the message, all of them in `folder`/<side>.log.
        """
        log = self.folder / f"{side}.log"
        with open(log, "w", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.side", side, *arguments],
                cwd=cwd or self.folder,
                env=self.machine.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            last = " | ".join(log.read_text(encoding="utf-8", errors="replace").split("\n")[-8:])
            raise UserError(f"{side} ended with status {done.returncode}: {last[-1500:]}")

    def write_params(self, seed: int) -> None:
        """Our side's params.yaml, with the tracking off as the reference's is."""
        config, precision = self.config, self.machine.precision
        values = {
            "base": {"model": str(self.base), "seed": seed, "device": self.machine.device},
            "concepts": {
                CLASS: {
                    "source": {"path": f"data/concepts/{CLASS}"},
                    "modifier_token": MODIFIER_TOKEN,
                    "class_prompt": CLASS,
                    "instance_prompt": INSTANCE_PROMPT,
                    "initializer_token": CLASS,
                }
            },
            "prepare": {
                "resolution": config.resolution,
                "captions": "template",  # the reference's recipe
                "masks": "none",
                "augmentation": config.augmentation,
                "hflip": config.hflip,
            },
            "train": {
                "max_steps": self.steps,
                "batch_size": BATCH_SIZE,
                "learning_rate": config.learning_rate,
                "prior_loss_weight": config.prior_loss_weight,
                "mixed_precision": precision,
                "checkpointing_steps": self.steps,
            },
            "tracking": {"enabled": False},
        }
        for key, value in self.options.items():
            *sections, name = key.split(".")
            section = values
            for each in sections:
                section = section.setdefault(each, {})
            section[name] = value
        (self.ours / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def reference_arguments(self, seed: int, workers: int) -> list[str]:
        """The reference's command line for the same run: one checkpoint at the end, like ours, and no tracker."""
        config = self.config
        values = {
            "pretrained_model_name_or_path": self.base,
            "instance_data_dir": self.folder / "photos",
            "class_data_dir": self.folder / "classes",
            "instance_prompt": INSTANCE_PROMPT.replace("{}", MODIFIER_TOKEN),
            "class_prompt": CLASS,
            "modifier_token": MODIFIER_TOKEN,
            "initializer_token": CLASS,
            "num_class_images": config.class_images,
            "prior_loss_weight": config.prior_loss_weight,
            "resolution": config.resolution,
            "train_batch_size": BATCH_SIZE,
            "learning_rate": config.learning_rate,
            "lr_warmup_steps": 0,
            "max_train_steps": self.steps,
            "checkpointing_steps": self.steps,
            "dataloader_num_workers": workers,
            "mixed_precision": self.machine.precision,
            "seed": seed,
            "output_dir": self.folder / "reference",
        }
        flags = ["with_prior_preservation", "real_prior", "scale_lr", "set_grads_to_none"]
        flags += ["hflip"] * config.hflip + ["noaug"] * (not config.augmentation)
        return [f"--{name}={value}" for name, value in values.items()] + [f"--{name}" for name in flags]


def make(
    folder: Path,
    config: Config,
    machine: Machine,
    steps: int,
    base: Path | None = None,
    options: dict[str, Any] | None = None,
) -> Project:
    """Fill a work folder; a model of random weights that lies there already is kept.

    Args:
        base: a base model in place of the configuration's own.
        options: see `Project`.
    """
    folder = folder.resolve()
    photos, classes = folder / "photos", folder / "classes"
    _photos(photos, config.resolution)
    _class_images(classes, config)
    data = folder / "ours/data"
    for name, source in (("instances", photos), ("classes", classes)):
        (data / name).mkdir(parents=True, exist_ok=True)
        (data / name / CLASS).unlink(missing_ok=True)
        (data / name / CLASS).symlink_to(source)
    base = base or (ROOT / "data/base" if config.shape is None else folder / f"base-{config.shape}")
    project = Project(folder, base, config, machine, steps, options or {})
    if config.shape and not (base / "model_index.json").exists():
        project.run("model", config.shape, str(base), machine.device)
    return project


def _photos(folder: Path, resolution: int) -> None:
    """The embedded cat's photos, scaled up where the configuration's resolution is above theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "data/concepts" / CLASS).glob("*.png")):
        with Image.open(path) as image:
            _scaled(image, resolution).save(folder / path.name)


def _class_images(folder: Path, config: Config) -> None:
    """Images of the pool, those of the class first, with images.txt and caption.txt as the reference reads them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names, captions = [], []
    with tarfile.open(ROOT / "data/pool/pool.tar") as pool:
        members = {member.name: member for member in pool if member.isfile()}
        found = [
            (name, pool.extractfile(members[f"{name[:-4]}.txt"]).read().decode().strip())
            for name in members
            if name.endswith(".jpg")
        ]
        found.sort(key=lambda pair: CLASS not in pair[1].split())
        for name, caption in found[: config.class_images]:
            path = folder / "images" / f"{len(names):06d}.png"
            with Image.open(pool.extractfile(members[name])) as image:
                _scaled(image, config.resolution).save(path)
            names.append(str(path))  # whole paths: the reference opens them as they are
            captions.append(caption)
    if len(names) < config.class_images:
        raise UserError(f"data/pool holds {len(names)} images, and {config.class_images} are needed")
    (folder / "images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    (folder / "caption.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def _scaled(image: Image.Image, least: int) -> Image.Image:
    image = image.convert("RGB")
    factor = least / min(image.size)
    if factor <= 1:
        return image
    return image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
