"""prepare@<concept>: captions, views and VAE moments of a concept's instance and class images."""

import sys
from pathlib import Path

from customdiff import params as params_file
from customdiff.errors import one_line_errors
from customdiff.files import whole_folder


def main(name: str) -> None:
    params = params_file.load()
    concept = params_file.concept(params, name)

    import torch  # seconds that a mistake in params.yaml need not wait for
    from diffusers import AutoencoderKL

    from customdiff import base, latents, preparation

    device = base.device(params.base.device)
    vae = base.load_part(params.base, "vae", AutoencoderKL, device=device).to(memory_format=torch.channels_last)
    instances = preparation.instance_examples(Path("data/instances", name), concept, params.prepare, device)
    classes = preparation.class_examples(Path("data/classes", name), concept, params.prepare)
    with whole_folder(Path("data/prepared", name)) as out:
        for kind, examples, prepare in (
            ("instance", instances, preparation.prepare_instances),
            ("class", classes, preparation.prepare_classes),
        ):
            prepared = prepare(examples, params, vae, preparation.seed_of(params, name, kind))
            latents.save(prepared, out / kind)
            print(f"{name}: {len(examples)} {kind} images, {len(prepared)} views, such as {prepared.captions[0]!r}")


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
