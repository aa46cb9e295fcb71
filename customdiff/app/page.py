"""The page: header, tabs, a notice when params.yaml is edited outside, and the server."""

import ipaddress
import secrets
from collections.abc import Callable

from nicegui import app, ui

from customdiff.app import concepts, learn, look, play, take_away
from customdiff.app.common import Session
from customdiff.app.guard import LOOPBACK, Guard
from customdiff.errors import UserError

TABS: dict[str, tuple[str, Callable[[Session], None]]] = {
    "Concepts": ("photo_library", concepts.build),
    "Learn": ("school", learn.build),
    "Look": ("insights", look.build),
    "Play": ("palette", play.build),
    "Take away": ("ios_share", take_away.build),
}
LIVE = ("Concepts", "Learn")  # others are built anew when they are opened, since a run may have changed what they show


def page() -> None:
    """One open page."""
    dark = ui.dark_mode(None)
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
        for name, (icon, _) in TABS.items():
            ui.tab(name, icon=icon)
    with ui.tab_panels(tabs, value="Concepts", keep_alive=True).classes("w-full max-w-5xl mx-auto bg-transparent"):
        bodies = {}
        for name in TABS:
            with ui.tab_panel(name).classes("p-0 sm:p-4"):
                bodies[name] = ui.column().classes("w-full")

    def open_tab(name: str) -> None:
        body = bodies[name]
        if name not in LIVE or not body.default_slot.children:
            body.clear()
            with body:
                TABS[name][1](session)

    tabs.on_value_change(lambda event: open_tab(event.value))
    open_tab("Concepts")


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
    print(
        f"customdiff app: http://{shown}:{port}{path}\nCtrl-C ends the page; a run of the pipeline goes on", flush=True
    )
    if token:
        print("whoever has this address can edit this project and run it; the connection is not encrypted", flush=True)
    ui.run(
        page,
        host=host,
        port=port,
        title="customdiff",
        dark=None,
        language="en-US",
        reload=False,
        show=path if show else False,
        show_welcome_message=False,
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
