"""download-data: gather one concept's instance images, checked and as RGB, in data/instances/<concept>/."""

import sys

from customdiff import config
from customdiff.errors import UserError, one_line_errors
from customdiff.sources import instance_images

with one_line_errors():
    settings = config.load()
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in settings.concepts:
        raise UserError(f"usage: python stages/download_data.py CONCEPT, one of: {', '.join(settings.concepts)}")
    folder = f"data/instances/{name}"
    result = instance_images.collect(name, settings.concepts[name].source, settings.download, folder)
    print(f"{name}: {len(result.kept)} instance images in {folder}, {len(result.set_aside)} set aside")
    for refused in result.set_aside:
        print(f"  set aside: {refused.name}: {refused.reason}")
    for note in result.notes:
        print(f"  warning: {note}")
