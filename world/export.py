"""Export what the project ships, to data/: the base model, both CLIPs, the pool, the example concepts."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from world.card import card
from world.catalogue import SUBJECTS
from world.exhibits import export_concepts, export_pool
from world.individuals import training_pack
from world.latents import load_clip, load_vae, scaling_factor, text_model
from world.loop import load_params
from world.scenes import CLIP_SIDE
from world.train_unet import build as build_unet
from world.train_unet import released_weights, scheduler


def image_processor() -> CLIPImageProcessorPil:
    """64 px, 0..255 to -1..1: the range that both CLIPs are trained on."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIDE},
        crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def export_clip(work: Path, name: str, folder: Path) -> None:
    """A CLIP as transformers loads it: model, tokenizer, image processor; fp16."""
    clip, tokenizer = load_clip(work, name)
    shutil.rmtree(folder, ignore_errors=True)
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def share_text_encoder(data: Path) -> None:
    """Store the weights of the CLIP's text encoder once: the base model's file becomes a shard of the CLIP, by a link.

    `export_clip` writes them a second time, 4 MB.
    """
    whole, text_file = data / "clip/model.safetensors", data / "base/text_encoder/model.safetensors"
    weights = load_file(whole)
    rest = {name: weight for name, weight in weights.items() if not name.startswith("text_model.")}
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": {name: second if name in rest else first for name in sorted(weights)},
    }
    save_file(rest, data / "clip" / second, {"format": "pt"})
    (data / "clip" / first).symlink_to(Path("..", text_file.relative_to(data)))
    (data / "clip/model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    whole.unlink()


def assemble(work: Path) -> StableDiffusionPipeline:
    """The pipeline of everything trained so far, in fp32."""
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=scaling_factor(work))
    clip, tokenizer = load_clip(work)
    params = load_params("unet")
    unet = build_unet(params, clip.config.text_config.hidden_size)
    unet.load_state_dict(released_weights(work, params["averaged"]))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_model(clip),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_base(work: Path, folder: Path) -> None:
    """The base model as a diffusers pipeline folder, fp16, with its card; its text encoder's names are the CLIP's."""
    pipeline = assemble(work)
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(beside)
    # transformers would load what is stored as fp16 in fp16, and diffusers the rest in fp32: a plain call then fails
    config = beside / "text_encoder/config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    text_encoder = beside / "text_encoder/model.safetensors"
    named_as_in_clip = {f"text_model.{name}": weight for name, weight in load_file(text_encoder).items()}
    save_file(named_as_in_clip, text_encoder, {"format": "pt"})
    if (work / "grade.json").exists():
        (beside / "README.md").write_text(card(work, pipeline, len(SUBJECTS)))
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def main() -> None:
    """Export the parts asked for, all by default."""
    parts = ("concepts", "pool", "clip", "judge", "base")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(parts)}; all by default")
    parser.add_argument("--work", type=Path, default=Path("world/build"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    work, data = arguments.work, arguments.data
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(parts)}")
    wanted = arguments.parts or parts
    if "concepts" in wanted:
        export_concepts(work, data)
    if "pool" in wanted:
        export_pool(training_pack(work, "varied"), load_params("pool"), data)
    for name in ("clip", "judge"):
        if name in wanted:
            export_clip(work, name, data / name)
    if "base" in wanted:
        export_base(work, data / "base")
    if (data / "clip/model.safetensors").exists():
        share_text_encoder(data)
    sizes = {part: sum(f.stat().st_size for f in (data / part).rglob("*") if f.is_file()) for part in parts}
    for file in data.rglob("*.safetensors"):
        file.chmod(0o644)  # written readable by their owner alone
    print(json.dumps({part: f"{size / 2**20:.2f} MiB" for part, size in sizes.items()}))


if __name__ == "__main__":
    main()
