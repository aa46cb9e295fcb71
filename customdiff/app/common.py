"""What the tabs share: the params file of one open page, dialogs with a diff, errors in words, pictures in the page."""

import base64
import io
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nicegui import ui
from PIL import Image

from customdiff.errors import UserError, printable
from customdiff.new_concept.params_file import ChangedOutsideError, ParamsFile
from customdiff.redaction import redact

REPORT = Path("results/evaluate/report.html")
ADDED, REMOVED = "text-green-700 dark:text-green-400", "text-red-700 dark:text-red-400"


class Session:
    """One open page: params.yaml as it was read, and what to do when it is read again."""

    def __init__(self) -> None:
        self.file = ParamsFile.read()
        self.on_change: list[Callable[[], object]] = []

    def load(self) -> None:
        """Read params.yaml again, and show it in all tabs."""
        with guarded():
            self.file = ParamsFile.read()
            for refresh in self.on_change:
                refresh()

    async def propose(
        self, edited: str, before: Callable[[], object] | None = None, more: Callable[[], object] | None = None
    ) -> bool:
        """Show the diff of an edit of params.yaml, and write it if the user agrees; returns whether it is written.

        Args:
            before: called before the file is written.
            more: adds elements to the dialog.

        Raises:
            UserError: the edited text is not valid.
        """
        difference = self.file.difference(edited)
        if not difference and not before:
            ui.notify("params.yaml stays as it is", type="info")
            return True
        if not await confirm("Write this to params.yaml?", difference or "params.yaml stays as it is", more=more):
            return False
        try:
            if before and self.file.is_current():
                before()
            self.file = self.file.write(edited)
        except ChangedOutsideError as error:
            if await confirm(str(error), error.difference, yes="Load params.yaml again"):
                self.load()
            return False
        ui.notify("params.yaml is written", type="positive")
        self.load()
        return True


@contextmanager
def guarded() -> Iterator[None]:
    """Show an error that the user can fix in one line; others as well, and with a traceback in the terminal."""
    try:
        yield
    except UserError as error:
        say(str(error))
    except Exception as error:
        say(f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:200]}; the terminal has the details")
        raise


def say(message: str) -> None:
    """Show an error until the user closes it."""
    text = printable(redact(message))
    with suppress(RuntimeError):  # the page was closed meanwhile
        ui.notify(
            text,
            type="negative",
            position="top",
            multi_line=True,
            timeout=0,
            close_button="Close",
            classes="break-words",
        )


async def confirm(title: str, difference: str, *, yes: str = "Write", more: Callable[[], object] | None = None) -> bool:
    """Ask with a diff; True if the user agrees."""
    with ui.dialog() as dialog, ui.card().classes("w-full max-w-3xl"):
        ui.label(title).classes("text-lg").props('role="heading" aria-level="2"')
        area = ui.scroll_area().classes("w-full h-60 border rounded").props('tabindex="0"')
        with area, ui.column().classes("gap-0"):
            for line in difference.splitlines():
                color = ADDED if line.startswith("+") else REMOVED if line.startswith("-") else ""
                ui.label(line).classes(f"font-mono text-xs whitespace-pre-wrap break-all {color}")
        if more:
            more()
        with ui.row().classes("w-full justify-end"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat")
            ui.button(yes, on_click=lambda: dialog.submit(True)).props("autofocus")
    agreed = await dialog
    dialog.delete()
    return bool(agreed)


def picture(image: Image.Image | Path, alt: str, classes: str = "w-32") -> ui.image:
    """A picture that is part of the page: no file is served."""
    shown = ui.image(data_uri(image)).classes(f"{classes} rounded")
    shown.props["alt"] = alt
    return shown.props("no-spinner fit=contain")


def data_uri(image: Image.Image | Path) -> str:
    """The data address of the bytes of a JPEG or PNG file, or of an image as PNG."""
    if isinstance(image, Path):
        return data_address(image.read_bytes(), "jpeg" if image.suffix == ".jpg" else "png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return data_address(buffer.getvalue(), "png")


def data_address(data: bytes, kind: str) -> str:
    """A data address of an image of some kind, such as png."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def busy(button: ui.button, work: Callable[[], Awaitable[object]]) -> None:
    """Have a button do work that takes a while: it turns, cannot be pressed again, and errors are shown."""

    async def run() -> None:
        button.props("loading").disable()
        try:
            with guarded():
                await work()
        finally:
            if not button.is_deleted:
                button.props(remove="loading").enable()

    button.on_click(run)


def heading(text: str) -> None:
    """A heading for eyes and screen readers."""
    ui.label(text).classes("text-lg font-medium").props('role="heading" aria-level="2"')
