"""Turn the shipped weights into checkpoints, so that training goes on from them on any machine.

The optimizers start afresh (start each training with `--restart`), as does the EMA, from the shipped weights. Weights
below `world/checkpoints` are of trainings that have not been shipped yet; they go before the shipped ones.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from world.catalogue import SUBJECTS
from world.loop import load_params, save_beside
from world.train_clip import Learner
from world.train_unet import PHASES
from world.train_vae import Learner as VaeLearner

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def checkpoint(weights: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
    """A checkpoint of weights alone, its clock at zero."""
    return {"model": weights, "step": 0, "seconds": 0.0, "optimizers": []} | more


def newest(data: Path, part: str) -> Path:
    """The folder of a part of the base model: below `world/checkpoints` where there is one, else the shipped one."""
    return CHECKPOINTS / part if (CHECKPOINTS / part).exists() else data / "base" / part


def main() -> None:
    """Write checkpoints of the first phases, and the tokenizer; refuse to overwrite a training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    work, data = arguments.work, arguments.data
    for name in ("vae", f"unet-{PHASES[0]}", "clip", "judge"):
        if (work / name / "checkpoint.pt").exists():
            parser.error(f"{work / name / 'checkpoint.pt'} is there already; move it away to start from {data}")
        (work / name).mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(newest(data, "vae")).float()
    learner = VaeLearner(vae, load_params("vae"))
    if (CHECKPOINTS / "discriminator.safetensors").exists():
        learner.discriminator.load_state_dict(load_file(CHECKPOINTS / "discriminator.safetensors"))
    save_beside(checkpoint(learner.state_dict()), work / "vae/checkpoint.pt")
    (work / "scaling_factor.json").write_text(json.dumps(vae.config.scaling_factor) + "\n")
    unet = UNet2DConditionModel.from_pretrained(newest(data, "unet")).float()
    save_beside(checkpoint(unet.state_dict(), ema=unet.state_dict()), work / f"unet-{PHASES[0]}/checkpoint.pt")
    for name in ("clip", "judge"):
        learner = Learner(CLIPModel.from_pretrained(data / name).float(), tuple(SUBJECTS))
        save_beside(checkpoint(learner.state_dict()), work / name / "checkpoint.pt")
    shutil.rmtree(work / "tokenizer", ignore_errors=True)
    CLIPTokenizer.from_pretrained(data / "clip").save_pretrained(work / "tokenizer")


if __name__ == "__main__":
    main()
