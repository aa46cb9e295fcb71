"""`customdiff serve-index`: serve the index of the pool to other pipelines."""

from pathlib import Path
from typing import Annotated

import typer

from customdiff import config
from customdiff.files import check_free

INDEX = Path("data/index")
EXAMPLES = """Examples:

\b
  customdiff serve-index                        http://127.0.0.1:1234/knn-service, for this machine
  customdiff serve-index --host 0.0.0.0         for all machines that reach this one; there is no login

Other pipelines set retrieve.backend: service and the keys that the command prints.
"""


def serve_index(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 1234,
    name: Annotated[str, typer.Option(help="Name of the index in requests.")] = "pool",
    out: Annotated[
        Path, typer.Option(help="New folder for the files of the service, or that of an earlier one.")
    ] = Path(".served-index"),
) -> None:
    """Serve data/index, which `dvc repro index-pool` builds, with clip-retrieval's HTTP service until it is stopped."""
    from customdiff.retrieval import served

    check_free(out, served.MARKER)
    retrieve = config.load().retrieve
    arguments = served.build(INDEX, Path(retrieve.index.pool), retrieve.index.clip, out, name)
    typer.echo(
        f"retrieve:\n  backend: service\n  service:\n    url: http://{host}:{port}/knn-service\n"
        f"    index_name: {name}\n    clip: {retrieve.index.clip}"
    )
    served.serve(arguments, out, host, port)
