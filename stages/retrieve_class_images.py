"""retrieve-class-images@<concept>: class images and captions for prior preservation, in data/classes/<concept>."""

import sys
from pathlib import Path

from customdiff.errors import one_line_errors


def main(*arguments: str) -> None:
    """Retrieve one concept's class images, if the training uses them."""
    from customdiff import config
    from customdiff.retrieval import class_images

    params = config.load()
    name, concept = config.stage_concept(params, arguments)
    folder = Path("data/classes", name)
    if not params.train.preserves_prior:
        print(f"{name}: no class images are retrieved: {class_images.write_unused(params.train, folder)}")
        return
    instances = Path("data/instances", name)
    result = class_images.retrieve(params, name, instances=instances, index="data/index", out=folder)
    print(
        f"{name}: {len(result.kept)} class images of {concept.class_prompt!r} in {folder}, "
        f"{len(result.set_aside)} set aside"
    )
    print(f"  {result.origin}")
    similarities = [entry["similarity"] for entry in result.kept if entry["similarity"] is not None]
    if similarities:
        print(f"  similarity to the class prompt: {max(similarities):.3f} to {min(similarities):.3f}")
    for refused in result.set_aside[:20]:
        print(f"  set aside: {refused.name}: {refused.reason}")
    for note in result.notes:
        print(f"  warning: {note}")


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
