"""download-data@<concept>: instance images, checked and stored as RGB in data/instances/<concept>."""

import sys
from pathlib import Path

from customdiff.errors import one_line_errors


def main(*arguments: str) -> None:
    """Collect the instance images of one concept."""
    from customdiff import config
    from customdiff.sources.holdout import check_instances
    from customdiff.sources.instance_images import collect

    params = config.load()
    name, concept = config.stage_concept(params, arguments)
    folder = Path("data/instances", name)
    result = collect(name, concept.source, params.download, folder)
    print(f"{name}: {len(result.kept)} instance images in {folder}, {len(result.set_aside)} set aside")
    for refused in result.set_aside:
        print(f"  set aside: {refused.name}: {refused.reason}")
    for note in result.notes:
        print(f"  warning: {note}")
    check_instances(name, concept, params.download, folder)


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
