"""Turn the shipped weights into checkpoints, so that training goes on from them on any machine.

The optimizers start afresh (start each training with `--restart`), as does the EMA, from the shipped weights.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from world.catalogue import SUBJECTS
from world.loop import save_beside
from world.train_clip import Learner


def checkpoint(weights: dict[str, torch.Tensor], **more: object) -> dict[str, object]:
    """A checkpoint of weights alone, its clock at zero."""
    return {"model": weights, "step": 0, "seconds": 0.0, "optimizers": []} | more


def main() -> None:
    """Write world/build/{vae,unet,clip,judge}/checkpoint.pt and the tokenizer; refuse to overwrite a training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    work, data = arguments.work, arguments.data
    for name in ("vae", "unet", "clip", "judge"):
        if (work / name / "checkpoint.pt").exists():
            parser.error(f"{work / name / 'checkpoint.pt'} is there already; move it away to start from {data}")
        (work / name).mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(data / "base/vae").float()
    save_beside(checkpoint(vae.state_dict()), work / "vae/checkpoint.pt")
    (work / "scaling_factor.json").write_text(json.dumps(vae.config.scaling_factor) + "\n")
    unet = UNet2DConditionModel.from_pretrained(data / "base/unet").float()
    save_beside(checkpoint(unet.state_dict(), ema=unet.state_dict()), work / "unet/checkpoint.pt")
    for name in ("clip", "judge"):
        learner = Learner(CLIPModel.from_pretrained(data / name).float(), tuple(SUBJECTS))
        save_beside(checkpoint(learner.state_dict()), work / name / "checkpoint.pt")
    shutil.rmtree(work / "tokenizer", ignore_errors=True)
    CLIPTokenizer.from_pretrained(data / "clip").save_pretrained(work / "tokenizer")


if __name__ == "__main__":
    main()
