"""prepare@<concept>: captions, augmented views and VAE moments, in data/prepared/<concept>."""

import sys
from pathlib import Path

from customdiff.errors import one_line_errors


def main(*arguments: str) -> None:
    """Prepare one concept's instance images, and its class images if they are used."""
    from customdiff import config
    from customdiff.files import atomic_directory

    params = config.load()  # before slow imports, so that errors in params.yaml appear at once
    name, concept = config.stage_concept(params, arguments)

    import torch
    from diffusers import AutoencoderKL

    from customdiff.files import project_home
    from customdiff.models import base
    from customdiff.preparation import prepare, prepared_set, sheet
    from customdiff.preparation.examples import class_examples, instance_examples
    from customdiff.preparation.latent_cache import LatentCache

    settings, seed = params.prepare, params.base.seed
    device = base.device(params.base.device)
    vae = base.load_part(params.base, "vae", AutoencoderKL, device=device).to(memory_format=torch.channels_last)
    instances = instance_examples(
        Path("data/instances", name),
        concept,
        settings,
        device,
        tokenizer=base.load_tokenizer(params.base),
        all_masks=params.train.mask_weight != 1,
    )
    for example in instances:
        print(f"  {example.path.name}: {example.caption!r} ({'; '.join(example.notes)})")
    cache = LatentCache(project_home() / ".latents" / name, vae)
    with atomic_directory(Path("data/prepared", name)) as out:
        seeds = {kind: prepare.seed_of(seed, name, kind) for kind in ("instance", "class")}
        sets = {"instance": prepare.prepare_instances(instances, settings, vae, seeds["instance"], cache)}
        if params.train.preserves_prior:
            classes = class_examples(Path("data/classes", name), concept, settings)
            sets["class"] = prepare.prepare_classes(classes, settings, vae, seeds["class"], cache)
        sheet.contact_sheet(instances).save(out / "sheet.jpg", quality=90)
        for kind, prepared in sets.items():
            prepared_set.save(prepared, out / kind)
            print(f"{name}: {len(prepared)} views of {kind} images, such as {prepared.captions[0]!r}")
    cache.prune()


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
