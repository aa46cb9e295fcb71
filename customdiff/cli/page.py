"""`customdiff app`: a local page over the pipeline."""

import socket
from typing import Annotated

import typer

from customdiff import config
from customdiff.errors import UserError

EXAMPLES = """Examples:

\b
  customdiff app                              open http://127.0.0.1:8080, for this machine only
  customdiff app --port 9000 --no-browser     print the address only
  customdiff app --host 0.0.0.0               for other machines as well, with a token in the address
"""


def page(
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a local page: add photos, mend captions and masks, train, compare images, export.

    It writes params.yaml and files beside the photos, and runs `dvc repro`, as you would in a terminal.
    """
    config.load()  # in a project folder, before slow imports
    try:
        import nicegui  # noqa: F401
    except ImportError as error:
        raise UserError("customdiff app: needs NiceGUI; install customdiff[app], or run `make app`") from error
    _check_free(host, port)
    from customdiff.app.page import serve

    serve(host, port, show=browser)


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port: {port} at {host} cannot be used ({error.strerror}); name another one") from error
