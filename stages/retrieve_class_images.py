"""retrieve-class-images: gather one concept's class images and captions in data/classes/<concept>/."""

import sys

from customdiff import config
from customdiff.errors import UserError, one_line_errors
from customdiff.retrieval import class_images

with one_line_errors():
    settings = config.load()
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in settings.concepts:
        raise UserError(
            f"usage: python stages/retrieve_class_images.py CONCEPT, one of: {', '.join(settings.concepts)}"
        )
    folder = f"data/classes/{name}"
    result = class_images.retrieve(settings, name, instances=f"data/instances/{name}", index="data/index", out=folder)
    prompt = settings.concepts[name].class_prompt
    print(f"{name}: {len(result.kept)} class images of {prompt!r} in {folder}, {len(result.set_aside)} set aside")
    similarities = [entry["similarity"] for entry in result.kept if entry["similarity"] is not None]
    if similarities:
        print(f"  similarity to the class prompt: {max(similarities):.3f} to {min(similarities):.3f}")
    for refused in result.set_aside[:20]:
        print(f"  set aside: {refused.name}: {refused.reason}")
    for note in result.notes:
        print(f"  warning: {note}")
