"""Tab Play: prompts, and the base model's image beside that of one adapter or two, from the same seed."""

import asyncio
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nicegui import ui
from PIL import Image

from customdiff.app.common import Session, busy, heading, picture
from customdiff.app.player import Drawing, Player, adapter_folders, subjects_of
from customdiff.errors import UserError
from customdiff.evaluation.report import image_grid

KEPT = 50  # drawings in the history
SEEDS = 2**32


@dataclass(frozen=True)
class Drawn:
    """A drawing with its images by title."""

    drawing: Drawing
    images: dict[str, Image.Image]

    @property
    def settings(self) -> str:
        """Seed and settings, for the user."""
        each = self.drawing
        return f"seed {each.seed}, {each.steps} steps, guidance {each.guidance_scale:g}, strength {each.strength:g}"

    def download(self) -> None:
        """Send the images beside one another, with their prompt."""
        buffer = io.BytesIO()
        image_grid([(self.drawing.prompt, self.images)], list(self.images)).save(buffer, "PNG")
        ui.download.content(buffer.getvalue(), f"customdiff-seed{self.drawing.seed}.png")


_players: dict[str, Player] = {}


def player_of(session: Session) -> Player:
    """The player that all pages share, so that a base model is in memory once."""
    params = session.file.params
    settings, device = params.evaluate, params.base.device
    key = f"{settings.scheduler} {settings.precision} {settings.eta} {device}"
    if key not in _players:
        _players.clear()
        _players[key] = Player(settings, device)
    return _players[key]


def build(session: Session) -> Callable[[], None] | None:
    """The prompt with its settings, the images, and the history, which stays while other tabs are open."""
    if not adapter_folders():
        ui.label("No adapter yet: Run in the tab Learn trains one.")
        return None
    return Play(session).offer_adapters


class Play:
    """One page's drawings."""

    def __init__(self, session: Session) -> None:
        self.session, self.history = session, list[Drawn]()
        settings = session.file.params.evaluate
        folders = {str(path): label for path, label in adapter_folders().items()}
        with ui.card().classes("w-full"):
            heading("Prompt")
            self.prompt = ui.input("Prompt").classes("w-full")
            self.chips = ui.row().classes("gap-1 items-center")
            with ui.row().classes("w-full gap-4"):
                self.first = ui.select(folders, value=next(iter(folders)), label="Adapter", on_change=self.offer)
                self.second = ui.select(folders, label="Second adapter", clearable=True, on_change=self.offer)
                for choice in (self.first, self.second):
                    choice.classes("w-64")
                self.seed = ui.number("Seed", value=session.file.params.base.seed, min=0, max=SEEDS - 1).classes("w-32")
                ui.button("New seed", on_click=lambda: self.seed.set_value(random.randrange(SEEDS))).props("flat")
            with ui.element("div").classes("grid grid-cols-1 sm:grid-cols-3 gap-x-8 w-full"):
                self.steps = _slider("Steps", 1, 100, 1, settings.steps)
                self.guidance = _slider("Guidance", 0, 15, 0.5, settings.guidance_scale)
                self.strength = _slider("Strength of the adapter", 0, 1.5, 0.05, 1)
            button = ui.button("Draw", icon="brush")
            busy(button, self.draw)
            self.prompt.on("keydown.enter", lambda: button.run_method("click"))
        with ui.card().classes("w-full"):
            heading("Images")
            self.shown = ui.column().classes("w-full gap-4")
        self.offer()

    def offer_adapters(self) -> None:
        """The adapters of now, which a training may have changed."""
        folders = {str(path): label for path, label in adapter_folders().items()}
        for choice, first in ((self.first, next(iter(folders), None)), (self.second, None)):
            choice.set_options(folders, value=choice.value if choice.value in folders else first)
        self.offer()

    def offer(self) -> None:
        """The tokens of the chosen adapters, as chips that put them into the prompt."""
        subjects = subjects_of(self.folders)
        self.chips.clear()
        with self.chips:
            ui.label("Put in:").classes("text-sm opacity-70")
            for subject in subjects:
                ui.chip(subject, on_click=lambda subject=subject: self.put_in(subject)).props("clickable outline")
        if not self.prompt.value and subjects:
            self.prompt.set_value(f"photo of a {subjects[0]} on a red background")

    def put_in(self, subject: str) -> None:
        """Add a subject at the end of the prompt."""
        self.prompt.set_value(f"{self.prompt.value.rstrip()} {subject} ".lstrip())
        self.prompt.run_method("focus")

    @property
    def folders(self) -> tuple[Path, ...]:
        """The chosen adapters."""
        return tuple(Path(choice.value) for choice in (self.first, self.second) if choice.value)

    async def draw(self) -> None:
        """Draw what is chosen, and show it above the earlier images."""
        if not self.folders or self.seed.value is None:
            raise UserError("choose an adapter, and a seed from 0")
        drawing = Drawing(
            self.prompt.value,
            self.folders,
            int(self.seed.value),
            int(self.steps.value),
            self.guidance.value,
            self.strength.value,
        )
        titles = ["base model", *(adapter_folders().get(folder, str(folder)) for folder in drawing.adapters)]
        titles = [f"{title} ({number})" if title in titles[:number] else title for number, title in enumerate(titles)]
        images = player_of(self.session).draw(drawing)
        self.history = [Drawn(drawing, {}), *self.history][:KEPT]
        for title in titles:
            image = await asyncio.to_thread(next, images)
            self.history[0].images[title] = image
            self.show_all()

    def show_all(self) -> None:
        """All drawings, the last one first."""
        self.shown.clear()
        with self.shown:
            for drawn in self.history:
                self.show(drawn)

    def show(self, drawn: Drawn) -> None:
        """The images of one drawing with their settings, and buttons."""
        with ui.column().classes("w-full gap-1"):
            ui.label(drawn.drawing.prompt).classes("font-medium break-words")
            with ui.row().classes("gap-3"):
                for title, image in drawn.images.items():
                    with ui.column().classes("gap-0 items-center"):
                        picture(image, f"{title}: {drawn.drawing.prompt}", "w-36 sm:w-64")
                        ui.label(title).classes("text-sm")
            with ui.row().classes("items-center gap-1"):
                ui.label(drawn.settings).classes("text-sm opacity-70")
                ui.button("Use again", on_click=lambda: self.use(drawn.drawing)).props("flat dense")
                ui.button("Download", on_click=drawn.download).props("flat dense")
            ui.separator()

    def use(self, drawing: Drawing) -> None:
        """Choose what a drawing was drawn from."""
        self.prompt.set_value(drawing.prompt)
        self.seed.set_value(drawing.seed)
        self.steps.set_value(drawing.steps)
        self.guidance.set_value(drawing.guidance_scale)
        self.strength.set_value(drawing.strength)
        for choice, folder in zip((self.first, self.second), (*drawing.adapters, None), strict=False):
            choice.set_value(str(folder) if folder else None)


def _slider(label: str, low: float, high: float, step: float, value: float) -> ui.slider:
    """A slider with its label and value above."""
    with ui.column().classes("w-full gap-0"):
        text = ui.label().classes("text-sm")
        slider = ui.slider(min=low, max=high, step=step, value=min(high, value)).props(f'aria-label="{label}"')
        text.bind_text_from(slider, "value", lambda now: f"{label}: {now:g}")
    return slider
