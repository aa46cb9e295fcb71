"""prepare@<concept>: captions, views and VAE moments of a concept's instance and class images."""

import sys
from pathlib import Path

from customdiff import config
from customdiff.errors import one_line_errors
from customdiff.files import atomic_directory


def main(name: str) -> None:
    params = config.load()
    concept = config.concept(params, name)

    import torch  # seconds that a mistake in params.yaml need not wait for
    from diffusers import AutoencoderKL

    from customdiff.models import base
    from customdiff.preparation import prepare, prepared_set

    device = base.device(params.base.device)
    vae = base.load_part(params.base, "vae", AutoencoderKL, device=device).to(memory_format=torch.channels_last)
    instances = prepare.instance_examples(Path("data/instances", name), concept, params.prepare, device)
    classes = prepare.class_examples(Path("data/classes", name), concept, params.prepare)
    with atomic_directory(Path("data/prepared", name)) as out:
        for kind, examples, prepare_images in (
            ("instance", instances, prepare.prepare_instances),
            ("class", classes, prepare.prepare_classes),
        ):
            prepared = prepare_images(examples, params, vae, prepare.seed_of(params, name, kind))
            prepared_set.save(prepared, out / kind)
            print(f"{name}: {len(examples)} {kind} images, {len(prepared)} views, such as {prepared.captions[0]!r}")


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
