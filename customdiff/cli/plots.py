"""`customdiff offline-plots`: let `dvc plots` draw without a network."""

import subprocess
import sys
from pathlib import Path

import typer

from customdiff.errors import UserError
from customdiff.files import atomic_file

VEGA_LITE = "5.20"  # DVC writes specifications of version 5
GLOBALS = "window.vegaEmbed = vegaEmbed; window.vegaLite = vegaLite; window.vega = vega;"
PAGE = Path(".dvc/tmp/offline-plots.html")
HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>customdiff</title>
<script>{libraries}</script>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def offline_plots() -> None:
    """Let `dvc plots show` and `dvc plots diff` write pages that open without a network.

    DVC's own pages load Vega from a content delivery network. This command writes a page template that contains Vega,
    from the package vl-convert-python, and names it in .dvc/config.local. `make install` runs it.
    """
    if not Path(".dvc").is_dir():
        raise UserError(".dvc: not found; run the command in the project folder")
    try:
        import vl_convert
    except ImportError as error:
        raise UserError("vl-convert-python is not installed; install customdiff[pipeline]") from error
    libraries = vl_convert.javascript_bundle(GLOBALS, VEGA_LITE).replace("</script", "<\\/script")
    with atomic_file(PAGE) as incoming:
        incoming.write_text(HTML.format(libraries=libraries), encoding="utf-8")
    command = [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template"]
    done = subprocess.run([*command, PAGE.relative_to(".dvc").as_posix()], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc config: {' '.join(done.stderr.split())[:300]}")
    typer.echo(f"dvc plots uses {PAGE}")
