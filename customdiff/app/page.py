"""The page: header, tabs, a notice when params.yaml is edited outside, and the server."""

import asyncio
import importlib
import ipaddress
import secrets
from collections.abc import Callable

from fastapi import Response
from nicegui import app, ui

from customdiff.app.common import REPORT, Session, guarded
from customdiff.app.guard import LOOPBACK, Guard
from customdiff.errors import UserError

# Tabs with their modules, which import torch, and icons
TABS = {
    "Concepts": ("concepts", "photo_library"),
    "Learn": ("learn", "school"),
    "Look": ("look", "insights"),
    "Play": ("play", "palette"),
    "Take away": ("take_away", "ios_share"),
}
NOTES = (
    "Ctrl-C ends the page; a run of the pipeline goes on",
    "Whoever has this address can edit and run this project. The connection is not encrypted.",
)
STYLE = """
.q-notification .q-btn { color: inherit !important }
.q-uploader__file { display: none }
.body--dark .text-primary { color: #8ab4f0 !important }
"""
POLICY = "sandbox allow-popups; default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@app.get("/report", include_in_schema=False)
def report() -> Response:
    """The report of the last evaluation, and no other file; nothing in it can run."""
    if not REPORT.is_file():
        return Response("no report yet; `evaluate` writes it\n", status_code=404, media_type="text/plain")
    return Response(REPORT.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": POLICY})


def page() -> None:
    """One open page."""
    dark = ui.dark_mode(None)
    ui.colors(primary="#2563a8", dark="#1d1f24", dark_page="#121317")
    ui.button.default_props("no-caps")
    ui.toggle.default_props("no-caps")
    ui.add_css(STYLE)
    with ui.header().classes("items-center justify-between py-1"):
        ui.label("customdiff").classes("text-xl").props('role="heading" aria-level="1"')
        ui.button(icon="contrast", on_click=dark.toggle).props('flat round color=white aria-label="Dark or light"')
    try:
        session = Session()
    except UserError as error:
        ui.label(str(error)).classes("whitespace-pre-wrap")
        ui.button("Try again", on_click=ui.navigate.reload)
        return
    _notice(session)
    with ui.tabs().classes("w-full").props("mobile-arrows outside-arrows no-caps") as tabs:
        for name, (_, icon) in TABS.items():
            ui.tab(name, icon=icon)
    with ui.tab_panels(tabs, value="Concepts", keep_alive=True).classes("w-full max-w-5xl mx-auto bg-transparent"):
        bodies = {}
        for name in TABS:
            with ui.tab_panel(name).classes("p-0 sm:p-4"):
                bodies[name] = ui.column().classes("w-full")

    opened: dict[str, Callable[[], None]] = {}  # what to do when a tab is opened again; others are built anew

    async def open_tab(name: str) -> None:
        if name in opened:
            opened[name]()
            return
        bodies[name].clear()
        with bodies[name]:
            with ui.row().classes("items-center") as wait:
                ui.spinner()
                ui.label("Loading ...")
            with guarded():
                module = await asyncio.to_thread(importlib.import_module, f"customdiff.app.{TABS[name][0]}")
                wait.delete()
                if again := module.build(session):
                    opened[name] = again

    tabs.on_value_change(lambda event: open_tab(event.value))
    ui.timer(0, lambda: open_tab("Concepts"), once=True)


def _notice(session: Session) -> None:
    """A line that appears when params.yaml is no longer as this page shows it."""
    with ui.row().classes("w-full items-center p-2 rounded bg-amber-200 text-black").props('role="alert"') as notice:
        ui.label("params.yaml was edited outside this page; what you write here would be refused.")
        ui.button("Load it", on_click=session.load).props("dense")
    notice.set_visibility(False)
    ui.timer(2.0, lambda: notice.set_visibility(not session.file.is_current()))


def serve(host: str, port: int, *, show: bool) -> None:
    """Serve the page until Ctrl-C; prints its address.

    Args:
        host: address to listen on; a token is needed where it is not a loopback address.
        show: open the browser.
    """
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app.add_middleware(Guard, token=token)
    shown = f"[{host}]" if ":" in host else host
    path = f"/?token={token}" if token else "/"
    app.on_startup(
        lambda: print(f"customdiff app: http://{shown}:{port}{path}\n{NOTES[token is not None]}", flush=True)
    )
    ui.page("/")(page)
    ui.run(
        host=host,
        port=port,
        title="customdiff",
        dark=None,
        language="en-US",
        reload=False,
        show=path if show else False,
        show_welcome_message=False,
        reconnect_timeout=30,  # s; a training may keep all cores busy
        favicon="🎨",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address.

    Raises:
        UserError: it is no address.
    """
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise UserError(f"--host: {host!r} is no IP address; use 127.0.0.1, or 0.0.0.0 for all interfaces") from error
