"""Painting of a subject mask on a photo."""

import numpy as np
from nicegui import events, ui
from PIL import Image, ImageDraw

from customdiff.app.common import data_uri
from customdiff.preparation.masks import SubjectMask

PINK = (255, 0, 90)
SIDE = 512  # px, in which a photo is painted on


class Painter:
    """A mask (mode L) in the size of its photo, and strokes on it."""

    def __init__(self, photo: Image.Image, mask: SubjectMask | None) -> None:
        self.photo = photo
        coverage = mask.coverage if mask else np.zeros((photo.height, photo.width), np.float32)
        self.mask = Image.fromarray(np.round(coverage * 255).astype(np.uint8))

    def stroke(self, points: list[tuple[float, float]], width: float, *, erase: bool) -> None:
        """Draw a line with round ends through points in px of the photo."""
        draw, color, radius = ImageDraw.Draw(self.mask), 0 if erase else 255, width / 2
        draw.line(points, color, max(1, round(width)), joint="curve")
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)

    def shown(self) -> Image.Image:
        """The photo, its subject tinted."""
        tint = Image.composite(Image.new("RGB", self.photo.size, PINK), self.photo, self.mask.point(lambda v: v // 2))
        scale = SIDE / max(tint.size)
        return tint.resize([max(1, round(scale * side)) for side in tint.size])


async def paint(photo: Image.Image, mask: SubjectMask | None) -> Image.Image | None:
    """Open a dialog to paint on a mask; returns the new one, or None if the user cancels."""
    painter = Painter(photo, mask)
    points: list[tuple[float, float]] = []
    scale = SIDE / max(photo.size)

    def on_mouse(event: events.MouseEventArguments) -> None:
        if event.type == "mousedown" or (event.type == "mousemove" and event.buttons == 1 and points):
            points.append((event.image_x, event.image_y))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            color = "white" if mode.value == "Erase" else "rgb(255,0,90)"
            style = f'fill="none" stroke="{color}" stroke-opacity="0.5" stroke-width="{size.value}"'
            canvas.set_content(f'<polyline points="{path}" {style} stroke-linecap="round" stroke-linejoin="round"/>')
        elif event.type in ("mouseup", "mouseleave") and points:
            stroke = [(x / scale, y / scale) for x, y in points]
            painter.stroke(stroke, size.value / scale, erase=mode.value == "Erase")
            show()

    def fill(value: int) -> None:
        painter.mask.paste(value, (0, 0, *painter.mask.size))
        show()

    def show() -> None:
        points.clear()
        canvas.set_content("")
        canvas.set_source(data_uri(painter.shown()))

    with ui.dialog() as dialog, ui.card().classes("w-full max-w-xl"):
        ui.label("Paint the subject").classes("text-lg").props('role="heading" aria-level="2"')
        canvas = ui.interactive_image(
            data_uri(painter.shown()),
            on_mouse=on_mouse,
            events=["mousedown", "mousemove", "mouseup", "mouseleave"],
            cross=True,
        ).classes("w-full touch-none")
        canvas.props('role="img" aria-label="The photo with its mask, to paint on with the mouse"')
        with ui.row().classes("w-full items-center"):
            mode = ui.toggle(["Paint", "Erase"], value="Paint")
            ui.label("Brush")
            size = ui.slider(min=4, max=128, value=32).classes("w-32").props('aria-label="Size of the brush"')
            ui.button("Clear", on_click=lambda: fill(0)).props("flat")
            ui.button("Whole photo", on_click=lambda: fill(255)).props("flat")
        with ui.row().classes("w-full justify-end"):
            ui.button("Cancel", on_click=lambda: dialog.submit(False)).props("flat")
            ui.button("Write the mask", on_click=lambda: dialog.submit(True))
    agreed = await dialog
    dialog.delete()
    return painter.mask if agreed else None
