"""prepare@<concept>: captions, augmented views and VAE moments, in data/prepared/<concept>."""

import sys
from pathlib import Path

from customdiff.errors import one_line_errors


def main(*arguments: str) -> None:
    """Prepare one concept's instance images, and its class images if they are used."""
    from customdiff import config

    params = config.load()  # before slow imports, so that errors in params.yaml appear at once
    name, _ = config.stage_concept(params, arguments)

    from customdiff.files import project_home
    from customdiff.preparation.prepare import prepare_concept

    examples, sets = prepare_concept(
        params,
        name,
        instances=Path("data/instances", name),
        classes=Path("data/classes", name),
        out=Path("data/prepared", name),
        cache=project_home() / ".latents" / name,
        others={other: Path("data/instances", other) for other in params.concepts if other != name},
    )
    for example in examples:
        print(f"  {example.path.name}: {example.caption!r} ({'; '.join(example.notes)})")
    for kind, prepared in sets.items():
        samples = " and ".join(repr(prepared.captions[place]) for place in (0, -1))
        print(f"{name}: {len(prepared)} views of {kind} images, such as {samples}")


if __name__ == "__main__":
    with one_line_errors():
        main(*sys.argv[1:])
