"""Tab Learn: a recipe, the keys that matter most, and the pipeline as it runs."""

import asyncio
from collections.abc import Callable
from typing import Any

from nicegui import ui
from pydantic.fields import FieldInfo

from customdiff.app import pipeline
from customdiff.app.common import Session, busy, data_address, guarded, heading, picture
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.evaluation.report import loss_curves
from customdiff.new_concept import presets
from customdiff.new_concept.params_file import with_concepts_of, with_values

KEYS = ("train.max_steps", "train.learning_rate", "train.prior_loss_weight", "base.seed")
ICONS = {
    "done": "check_circle",
    "unchanged": "fast_forward",
    "running": "hourglass_top",
    "failed": "error",
    "stopped": "pause_circle",
}


def build(session: Session) -> Callable[[], None]:
    """The settings, and the run, which stay as they are while other tabs are open."""
    with ui.card().classes("w-full"):
        heading("Recipe")
        settings = Settings(session)
    with ui.card().classes("w-full"):
        heading("Run")
        Run(settings)
    return lambda: None


class Settings:
    """A preset, and the keys of params.yaml that matter most, with their help from the schema."""

    def __init__(self, session: Session) -> None:
        self.session = session
        known = presets.presets()
        with ui.row().classes("w-full items-center gap-4"):
            self.preset = ui.select(list(known), label="Preset", clearable=True).classes("w-64")
            busy(ui.button("Use it with my concepts").props("flat"), self.use_preset)
        ui.label().classes("text-sm opacity-70").bind_text_from(
            self.preset, "value", lambda name: presets.first_sentence(known[name]) if name else "Values of params.yaml:"
        )
        self.fields: dict[str, ui.number] = {}
        with ui.element("div").classes("grid grid-cols-1 sm:grid-cols-2 gap-x-6 gap-y-3 w-full"):
            for key in KEYS:
                field = ui.number(key).classes("w-full")
                field.props["hint"] = field_of(key).description
                self.fields[key] = field
        busy(ui.button("Show and write the change", icon="save").props("flat"), self.write)
        self.show()
        session.on_change.append(self.show)

    def show(self) -> None:
        """The values of params.yaml."""
        params = self.session.file.params
        for key, field in self.fields.items():
            section, _, name = key.partition(".")
            field.set_value(getattr(getattr(params, section), name))

    async def use_preset(self) -> None:
        """Replace params.yaml by a preset with the concepts of now."""
        if not self.preset.value:
            raise UserError("choose a preset first")
        text = presets.presets()[self.preset.value].read_bytes().decode()
        await self.session.propose(with_concepts_of(self.session.file.text, text))

    async def write(self) -> bool:
        """Write the keys that were edited; False if the user does not agree."""
        values = {key: _value(key, field.value) for key, field in self.fields.items()}
        return await self.session.propose(with_values(self.session.file.text, values))

    @property
    def are_edited(self) -> bool:
        """Whether a field differs from params.yaml."""
        values = {key: _value(key, field.value) for key, field in self.fields.items()}
        return with_values(self.session.file.text, values) != self.session.file.text


class Run:
    """`dvc repro` as it runs: buttons, stages, progress, loss, validation images, log."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.seen = settings, ""
        with ui.row().classes("w-full items-center"):
            self.start = ui.button("Run", icon="play_arrow")
            self.stop = ui.button("Stop", icon="stop", color="negative", on_click=self.end)
            self.state = ui.label().props('role="status" aria-live="polite"')
        busy(self.start, self.begin)
        self.stages = ui.row().classes("gap-1")
        self.bar = ui.linear_progress(show_value=False).props('aria-label="Progress of the stage"')
        self.step = ui.label().classes("text-sm")
        with ui.row().classes("w-full gap-4 items-start"):
            self.loss = ui.image().classes("bg-white rounded w-full sm:w-96").props('no-spinner alt="Training loss"')
            self.images = ui.row().classes("gap-2")
        self.details = ui.expansion("Log").classes("w-full")
        with self.details:
            self.log = ui.label().classes("font-mono text-xs whitespace-pre-wrap break-all")
        ui.timer(1.0, self.update)

    async def begin(self) -> None:
        """Start the pipeline, or continue it; edits of the keys are written first."""
        if self.settings.are_edited and not await self.settings.write():
            return
        await asyncio.to_thread(pipeline.start)
        await self.update()

    async def end(self) -> None:
        """Send Ctrl-C to the run."""
        with guarded():
            await asyncio.to_thread(pipeline.stop)
            ui.notify("stopping; a training writes a checkpoint first, and Run continues it", type="info")

    async def update(self) -> None:
        """Show the progress; costs little while nothing changes."""
        is_running, foreign = pipeline.running() is not None, pipeline.foreign()
        outcome = pipeline.outcome()
        self.stop.set_enabled(is_running)
        self.start.set_enabled(not is_running and not foreign)
        progress = await asyncio.to_thread(pipeline.progress)
        text = "The pipeline is running." if is_running else WORDS[outcome]
        if foreign and not is_running:
            text = (
                f"Process {foreign.pid} ({pipeline.command(foreign)}) runs the pipeline in another terminal; Run is "
                "possible when it has finished."
            )
        self.state.set_text(text)
        now = repr((progress, is_running, foreign))
        if now == self.seen:
            return
        self.seen = now
        self.details.set_value(self.details.value or outcome == "failed")
        self.show(progress)
        await self.show_training(progress)

    def show(self, progress: pipeline.Progress) -> None:
        """Stages, progress bar and log."""
        self.stages.clear()
        with self.stages:
            for name, state in progress.stages.items():
                ui.chip(f"{name}: {state}", icon=ICONS.get(state, "error")).props("outline square")
        self.bar.set_value(progress.done / progress.total if progress.total else 0)
        self.step.set_text(f"{progress.label}: {progress.done} of {progress.total}" if progress.total else "")
        self.log.set_text("\n".join(progress.lines) or "nothing yet")

    async def show_training(self, progress: pipeline.Progress) -> None:
        """The loss, and the validation images of the last step."""
        self.loss.set_visibility(len(progress.losses) > 1)
        if len(progress.losses) > 1:
            columns: dict[str, list[float]] = {"step": list(progress.losses), "loss": list(progress.losses.values())}
            svg = await asyncio.to_thread(loss_curves, columns)
            self.loss.set_source(data_address(svg, "svg+xml"))
        found = await asyncio.to_thread(pipeline.validation_images) if progress.losses else {}
        self.images.clear()
        with self.images:
            for step in [max(found)] if found else []:
                for path in found[step]:
                    with ui.column().classes("gap-0"):
                        picture(path, f"validation image after {step} steps", "w-32")
                        ui.label(f"after {step} steps").classes("text-xs")


WORDS = {
    "": "No run yet.",
    "finished": "The last run has finished.",
    "stopped": "The last run was stopped; Run continues it.",
    "failed": "The last run failed; the log says why.",
    "killed": "The last run was killed; Run continues it.",
}


def field_of(key: str) -> FieldInfo:
    """The field of the schema for a dotted key."""
    section, _, name = key.partition(".")
    part: Any = Params.model_fields[section].annotation
    return part.model_fields[name]


def _value(key: str, value: float | None) -> float:
    """What the user typed, as the type of the key."""
    if value is None:
        raise UserError(f"{key}: is empty; give a number")
    return int(value) if field_of(key).annotation is int and value == int(value) else value
