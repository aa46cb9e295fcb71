"""Screenshots of MLflow's pages and of `dvc plots` for docs/tracking.md, from the runs of this project.

Run `make repro` first, so that there is a run, and some `dvc exp run`, `customdiff sweep` or `customdiff compare`, so
that there is something to compare. Needs Chromium, and Playwright: `uv pip install playwright`.

    python docs/screenshots.py [--out docs/images] [--chromium /usr/bin/chromium]
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright

from customdiff import tracking

SIZE = {"width": 1280, "height": 860}
# Pages of model training instead of language models, and no assistant in front of them
PREFERENCES = """
localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
COLUMNS = ["evaluation/image_alignment", "evaluation/text_alignment", "evaluation/score"]


def main() -> None:
    """Take all screenshots."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = arguments.parse_args()
    if not options.chromium:
        sys.exit("error: --chromium: no Chromium found; install it, or name its program")
    options.out.mkdir(parents=True, exist_ok=True)
    client = tracking.connect()
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show"], check=True, stdout=subprocess.DEVNULL)
    with server(client.tracking_uri) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport=SIZE)  # type: ignore[arg-type]
        context.add_init_script(PREFERENCES)
        page = context.new_page()
        for name, path in addresses(client).items():
            visit(page, path if path.startswith("file:") else f"{address}/#{path}", name)
            page.screenshot(path=options.out / f"{name}.jpg", quality=75, type="jpeg")
            print(f"{options.out / name}.jpg")
        browser.close()


def addresses(client: MlflowClient) -> dict[str, str]:
    """Paths of the pages by the name of their screenshot."""
    experiment = client.get_experiment_by_name("customdiff")
    if experiment is None:
        sys.exit("error: no runs; run `make repro` first")
    number = experiment.experiment_id
    runs = client.search_runs([number], f"metrics.`{tracking.EVALUATED}` > -1", order_by=["attributes.start_time ASC"])
    model = next(each for each in client.search_registered_models() if each.name.startswith("customdiff-"))
    champion = client.get_model_version_by_alias(model.name, "champion")
    run = f"/experiments/{number}/runs/{champion.run_id}"
    compared = json.dumps([each.info.run_id for each in runs[-4:]])
    return {
        "runs": f"/experiments/{number}/runs",
        "run": run,
        "charts": f"{run}/model-metrics",
        "comparison": f'/compare-runs?runs={compared}&experiments=["{number}"]',
        "models": f"/experiments/{number}/models",
        "registry": f"/models/{model.name}",
        "plots": Path("dvc_plots/index.html").resolve().as_uri(),
    }


def visit(page: Page, address: str, name: str) -> None:
    """Open a page and show what the screenshot is about."""
    page.goto("about:blank")  # so that a change of the fragment alone loads the page
    page.goto(address)
    page.wait_for_timeout(7000)
    if name == "run":
        page.get_by_text("Show more", exact=True).click()
        page.wait_for_timeout(2000)
    if name == "runs":
        add_columns(page)


def add_columns(page: Page) -> None:
    """Add the figures to the table of runs."""
    page.get_by_role("button", name="Columns").click()
    for column in COLUMNS:
        page.get_by_placeholder("Search columns").fill(column)
        page.wait_for_timeout(800)
        page.get_by_role("dialog").get_by_text(column, exact=True).first.click()
    page.keyboard.press("Escape")
    page.wait_for_timeout(1500)


@contextmanager
def server(store: str) -> Iterator[str]:
    """`mlflow ui` on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--port", str(port)]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([*command, "--workers", "1"], **quiet)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


if __name__ == "__main__":
    main()
