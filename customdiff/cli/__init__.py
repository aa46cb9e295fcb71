"""Command line `customdiff <command>`, one module per family of commands.

Commands import torch and diffusers when they run, so that help and errors appear at once.
"""

import typer

from customdiff.cli import (
    adapters,
    benchmark,
    captions,
    compare,
    formats,
    hub,
    new,
    page,
    plots,
    preset,
    sample,
    serve_index,
    sweep,
)
from customdiff.errors import one_line_errors

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Custom Diffusion: teach a text-to-image model a subject from a few photos.

    To run the pipeline, add your photos with `customdiff new`, or edit params.yaml, and run `dvc repro`. These commands
    prepare it and use its results.""",
)
commands.command(epilog=sample.EXAMPLES, short_help="Generate images with an adapter.")(sample.sample)
commands.command(epilog=new.EXAMPLES, short_help="Add a concept to params.yaml from photos.")(new.new)
commands.command(epilog=preset.EXAMPLES, short_help="List, print or install presets of params.yaml.")(preset.preset)
commands.command(short_help="Check params.yaml.")(preset.check)
commands.command(epilog=captions.EXAMPLES, short_help="Show or write the captions of photos.")(captions.captions)
commands.command(epilog=sweep.EXAMPLES, short_help="Evaluate several checkpoints of a training.")(sweep.sweep)
commands.command(short_help="List the checkpoints of all trainings.")(sweep.checkpoints)
commands.command(epilog=compare.EXAMPLES, short_help="Compare methods or adapters.")(compare.compare)
commands.add_typer(benchmark.benchmark, name="benchmark", short_help="Run published benchmarks.")
commands.command(epilog=formats.EXPORT_EXAMPLES, short_help="Export an adapter to another program's format.")(
    formats.export
)
commands.command("import", epilog=formats.IMPORT_EXAMPLES, short_help="Import an adapter of another program.")(
    formats.import_
)
commands.command(epilog=hub.EXAMPLES, short_help="Publish an adapter on the Hugging Face Hub.")(hub.push)
commands.command(epilog=adapters.MERGE_EXAMPLES, short_help="Merge several adapters into one.")(adapters.merge)
commands.command(epilog=adapters.COMPRESS_EXAMPLES, short_help="Compress an adapter.")(adapters.compress)
commands.command("serve-index", epilog=serve_index.EXAMPLES, short_help="Serve the index of the pool.")(
    serve_index.serve_index
)
commands.command("app", epilog=page.EXAMPLES, short_help="Open a local page over the pipeline.")(page.page)
commands.command("offline-plots", short_help="Let `dvc plots` draw without a network.")(plots.offline_plots)


def app() -> None:
    """Run the command line; a `UserError` prints one line on stderr and exits with status 1."""
    with one_line_errors():
        commands()
