"""The command line, `customdiff <command>`: one module for each family of commands.

Light to import: torch and diffusers are loaded by the commands that draw.
"""

import typer

from customdiff.cli import adapters, compare, formats, hub, preset, sample, sweep
from customdiff.errors import one_line_errors

commands = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="""Custom Diffusion: teach a text-to-image model a subject from a few pictures.

    The pipeline itself is DVC's: edit params.yaml, then run `dvc repro`. These commands are for before and after.""",
)
commands.command(epilog=sample.EXAMPLES, short_help="Draw images with an adapter.")(sample.sample)
commands.command(epilog=preset.EXAMPLES, short_help="List, print or install ready params.yaml files.")(preset.preset)
commands.command(short_help="Check params.yaml.")(preset.check)
commands.command(epilog=sweep.EXAMPLES, short_help="Grade a training at several of its steps.")(sweep.sweep)
commands.command(short_help="List the checkpoints of all trainings.")(sweep.checkpoints)
commands.command(epilog=compare.EXAMPLES, short_help="Grade methods or adapters side by side.")(compare.compare)
commands.command(epilog=formats.EXPORT_EXAMPLES, short_help="Write an adapter for another program.")(formats.export)
commands.command("import", epilog=formats.IMPORT_EXAMPLES, short_help="Read another program's.")(formats.import_)
commands.command(epilog=hub.EXAMPLES, short_help="Publish an adapter on the Hugging Face Hub.")(hub.push)
commands.command(epilog=adapters.MERGE_EXAMPLES, short_help="Make one adapter of several.")(adapters.merge)
commands.command(epilog=adapters.COMPRESS_EXAMPLES, short_help="Make an adapter small.")(adapters.compress)


def app() -> None:
    """Run the command line. A mistake of the user's ends in one line on stderr and exit status 1."""
    with one_line_errors():
        commands()
