"""Teach a subject with the library alone: no DVC, no MLflow, no params.yaml.

    python examples/train_without_dvc.py data/concepts/cat build/my-cat --steps 100

learns from a folder of photos and writes the adapter and a few images. The stages of the pipeline do the same in
stages/, each with more to say.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

import customdiff
from customdiff.config import Params
from customdiff.errors import one_line_errors
from customdiff.models import base, sampling
from customdiff.preparation import prepare, prepared_set
from customdiff.preparation.examples import instance_examples
from customdiff.sources.instance_images import collect
from customdiff.tracking import Tracker
from customdiff.training import trainer


def main() -> None:
    """Learn, save, draw."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("photos", type=Path, help="folder of 4 to 5 photos, with or without captions (.txt)")
    arguments.add_argument("out", type=Path, help="new folder for the adapter and the images")
    arguments.add_argument("--class-prompt", default="cat", help="class of the subject")
    arguments.add_argument("--base", default="data/base", help="folder or Hub name of the base model")
    arguments.add_argument("--steps", type=int, default=250)
    options = arguments.parse_args()
    params = Params.model_validate(
        {
            "base": {"model": options.base},
            "concepts": {
                "subject": {
                    "source": {"path": str(options.photos)},
                    "modifier_token": "<new1>",
                    "class_prompt": options.class_prompt,
                    "instance_prompt": f"photo of a {{}} {options.class_prompt}",
                }
            },
            "prepare": {"resolution": 128, "augmentation": False, "hflip": False, "views": 40},
            "train": {"max_steps": options.steps, "learning_rate": 1.5e-4, "with_prior_preservation": False},
        }
    )
    learn(params, options.out)
    prompts = [f"a <new1> {options.class_prompt} {place}" for place in ("on a red background", "in the snow")]
    draw(options.base, options.out / "adapter", prompts, options.out)
    print(f"adapter and images: {options.out}")


def learn(params: Params, out: Path) -> None:
    """Train on the photos of `params` and write `out`/adapter."""
    device = base.device(params.base.device)
    with TemporaryDirectory() as scratch:
        photos, prepared = Path(scratch, "photos"), Path(scratch, "prepared")
        for name, concept in params.concepts.items():
            collect(name, concept.source, params.download, photos)
            tokenizer = base.load_tokenizer(params.base)
            examples = instance_examples(photos, concept, params.prepare, device, tokenizer=tokenizer)
            vae = base.load_part(params.base, "vae", AutoencoderKL, device=device)
            seed = prepare.seed_of(params.base.seed, name, "instance")
            (prepared / name).mkdir(parents=True)
            views = prepare.prepare_instances(examples, params.prepare, vae, seed)
            prepared_set.save(views, prepared / name / "instance")
        run = trainer.run(params, prepared, Path(scratch, "runs"), lambda run_id: Tracker())
        run.copy_results(out / "adapter", out / "training")


def draw(model: str, adapter: Path, prompts: list[str], out: Path) -> None:
    """Generate an image of each prompt, the way that any diffusers program does."""
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    customdiff.load(pipe, adapter)
    images = sampling.generate(pipe, prompts, [42] * len(prompts), steps=25, guidance_scale=3.5, eta=1.0)
    for number, image in enumerate(images):
        image.save(out / f"image-{number}.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
