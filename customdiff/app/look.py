"""Tab Look: the report of the last evaluation, validation images by step, and where to read on."""

import os
from pathlib import Path

from nicegui import ui

from customdiff import tracking
from customdiff.app import pipeline
from customdiff.app.common import REPORT, Session, heading, picture
from customdiff.redaction import redact

RUN_FILE, ADAPTER = Path("results/train/run.json"), Path("models/adapter")


def build(session: Session) -> None:
    """The parts of the tab, built anew when it is opened."""
    with ui.card().classes("w-full"):
        heading("The training, by step")
        _steps()
    with ui.card().classes("w-full"):
        heading("The evaluation")
        with ui.row().classes("gap-4"):
            if REPORT.is_file():
                ui.link("Report in a tab of its own", "/report", new_tab=True)
            _mlflow()
        if not REPORT.is_file():
            ui.label("No report yet: Run in the tab Learn evaluates after the training.")
            return
        frame = ui.element("iframe").classes("w-full bg-white rounded border-0").style("height: 75vh")
        frame.props(f'src="/report?{REPORT.stat().st_mtime_ns}" title="Report of the evaluation" sandbox=""')


def _steps() -> None:
    """A slider over the steps that have validation images."""
    found = pipeline.validation_images()
    if not found:
        ui.label("No validation images yet: a training draws them every train.validation.every steps.")
        return
    steps = sorted(found)

    @ui.refreshable
    def shown(step: int) -> None:
        ui.label(f"After {step} steps" if step else "Before the training").props('aria-live="polite"')
        with ui.row():
            for path in found[step]:
                picture(path, f"validation image after {step} steps", "w-40")

    slider = ui.slider(min=0, max=len(steps) - 1, value=len(steps) - 1, step=1).classes("w-full max-w-md")
    slider.props('aria-label="Step of the training" snap markers')
    shown(steps[-1])
    slider.on_value_change(lambda event: shown.refresh(steps[int(event.value)]))


def _mlflow() -> None:
    """A link to the run in MLflow."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    address = redact(server) if server.startswith("http") else "http://127.0.0.1:5000"
    try:
        ids = tracking.run_of(RUN_FILE, ADAPTER)
        place = f"experiments/{ids['experiment_id']}/runs/{ids['run_id']}"
    except KeyError:
        return
    ui.link("Run in MLflow", f"{address.rstrip('/')}/#/{place}", new_tab=True)
    if not server:
        ui.label("after `make ui` in a terminal").classes("opacity-70")
