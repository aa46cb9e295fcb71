"""Tab Take away: `customdiff export` and `customdiff push`, and what they say."""

import asyncio
import itertools
import re
import sys
from pathlib import Path

from nicegui import ui

from customdiff.adapters.formats import FORMATS
from customdiff.app.common import Session, busy, heading
from customdiff.app.player import adapter_folders
from customdiff.errors import UserError, printable
from customdiff.redaction import redact

NAME = re.compile(r"\w[\w.-]*")


def build(session: Session) -> None:
    """Both commands."""
    with ui.card().classes("w-full"):
        heading("Export to another program")
        _export()
    with ui.card().classes("w-full"):
        heading("Publish on the Hugging Face Hub")
        _push()


def _export() -> None:
    known = {name: f"{name}: {form.description}" for name, form in FORMATS.items() if "export" in form.directions}
    form = ui.select(known, value="lora", label="Format").classes("w-full max-w-2xl")
    with ui.row().classes("items-center gap-4"):
        adapter = _adapter()
        folder = ui.input("Folder in exports/", value="lora").props('hint="a new one"')
        rank = ui.number("Maximum rank", min=1).classes("w-64").props('hint="lora and kohya; empty: no limit"')
    form.on_value_change(lambda event: folder.set_value(event.value))
    button = ui.button("Export", icon="download")
    said = _said()

    async def export() -> None:
        if not NAME.fullmatch(folder.value or ""):
            raise UserError(f"folder: {folder.value!r} must be of letters, digits, _, - and ., such as lora")
        limit = [f"--rank={int(rank.value)}"] if rank.value else []
        out = f"--out=exports/{folder.value}"
        await _tell(said, "export", f"--format={form.value}", f"--adapter={adapter.value}", out, *limit)

    busy(button, export)


def _push() -> None:
    with ui.row().classes("items-center gap-4"):
        repository = ui.input("Repository", placeholder="owner/name")
        license = ui.input("License", placeholder="cc-by-4.0")
        base = (
            ui.input("Base model on the Hub", placeholder="owner/name")
            .classes("w-64")
            .props('hint="empty: as in the adapter"')
        )
    with ui.row().classes("items-center gap-4"):
        adapter = _adapter()
        public = ui.switch("Visible to everyone (--public)")
        dry = ui.switch("Only write what would be sent (--dry-run)", value=True)
    button = ui.button("Publish", icon="cloud_upload")
    ui.label("Log in with `hf auth login` in a terminal first; the page asks for no password.").classes("opacity-70")
    said = _said()

    async def push() -> None:
        arguments = [f"--adapter={adapter.value}", f"--license={license.value or ''}"]
        arguments += [f"--base-model={base.value}"] if base.value else []
        arguments += ["--public"] if public.value else []
        arguments += [f"--dry-run={_free('exports/card')}"] if dry.value else []
        await _tell(said, "push", *arguments, "--", repository.value or "")

    busy(button, push)


def _adapter() -> ui.select:
    """A choice among the adapters of this project."""
    folders = {str(path): label for path, label in adapter_folders().items()}
    return ui.select(folders, value=next(iter(folders), None), label="Adapter").classes("w-72")


def _free(stem: str) -> str:
    """A name that no file has."""
    names = (f"{stem}{number or ''}" for number in itertools.count())
    return next(name for name in names if not Path(name).exists())


def _said() -> ui.label:
    said = ui.label().classes("font-mono text-xs whitespace-pre-wrap break-all w-full").props('role="status"')
    said.set_visibility(False)
    return said


async def _tell(said: ui.label, *arguments: str) -> None:
    """Run a command of customdiff, and show what it says."""
    said.set_visibility(True)
    said.set_text(f"customdiff {' '.join(arguments)} ...")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "customdiff.cli", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    said.set_text(printable(redact(output.decode(errors="replace"))).strip() or "done")
    if process.returncode == 0:
        ui.notify("done", type="positive")
    else:
        ui.notify("failed; the text below the button says why", type="negative")
