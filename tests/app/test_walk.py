"""The page in a real browser: the whole way on the embedded base model, and what bad input does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from campaign import project
from conftest import ROOT

pytest.importorskip("nicegui")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]
PHOTOS = sorted((ROOT / "data/concepts/cat").glob("*.png"))
TRAINING = {"max_steps": 250, "checkpointing_steps": 10, "validation": {"every": 10, "steps": 5}}
MINUTES = 60_000  # ms
SHOTS = os.environ.get("CUSTOMDIFF_SCREENSHOTS")  # folder; see docs/app.md


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone with a small params.yaml."""
    return project.make(tmp_path_factory.mktemp("walk") / "clone", {"train": TRAINING, "evaluate": {"steps": 10}})


def environment(clone: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return inherited | {"PATH": path, "PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(clone: Path, *options: str) -> Iterator[str]:
    """The page of the clone, served by the command line; yields the address that it prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "customdiff.cli", "app", "--no-browser", "--port", port, *options]
    with subprocess.Popen(command, cwd=clone, env=environment(clone), stdout=subprocess.PIPE, text=True) as server:
        try:
            printed = server.stdout.readline().removeprefix("customdiff app: ").strip()
            wait_until(lambda: is_open(int(port)))
            yield printed
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def address(clone) -> Iterator[str]:
    """Where the clone's page is."""
    with served(clone) as found:
        yield found.rstrip("/")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser, address):
    """An open page; it asks no other host for anything."""
    context = browser.new_context(viewport={"width": 1200, "height": 860})
    opened = context.new_page()
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.set_default_timeout(MINUTES)
    opened.goto(address)
    yield opened
    shoot(opened, "last")
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}.jpg", type="jpeg", quality=60)


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).last.click()


def params(clone: Path) -> dict:
    return yaml.safe_load((clone / "params.yaml").read_text())


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_the_whole_way(page, clone):
    started = time.monotonic()
    add_a_concept(page, clone)
    mend(page, clone)
    train(page, clone)
    first, second = draw(page)
    tab(page, "Look")
    page.frame_locator("iframe").get_by_text("of the way to your").first.wait_for()
    shoot(page, "look")
    tab(page, "Take away")
    press(page, "Export")
    page.get_by_text("exports/lora:").wait_for()
    shoot(page, "take-away")
    assert list((clone / "exports/lora").glob("*.safetensors"))
    print(f"walk: {time.monotonic() - started:.0f} s; first drawing {first:.1f} s, second {second:.1f} s")


def add_a_concept(page, clone: Path) -> None:
    before = (clone / "params.yaml").read_text()
    page.locator("input[type=file]").set_input_files(PHOTOS)
    page.get_by_role("button", name="Leave out").nth(4).wait_for()
    page.get_by_label("Name").fill("tom")
    press(page, "Propose the class")
    wait_until(lambda: page.get_by_label("Class").input_value())
    page.get_by_label("Class").fill("cat")
    page.get_by_role("switch", name="Learn it alone").click()
    press(page, "Show captions, masks and the change")
    page.get_by_text("+  tom:").wait_for()
    shoot(page, "concepts")
    assert (clone / "params.yaml").read_text() == before  # nothing is written before the user agrees
    press(page, "Write")
    wait_until(lambda: list(params(clone)["concepts"]) == ["tom"])
    assert len(list((clone / "data/concepts/tom").glob("*.png"))) == 5


def mend(page, clone: Path) -> None:
    page.get_by_label("Caption of 02.png").fill("a {} cat & friends on a red table")
    press_in_row(page, "02.png", "Save the caption")
    page.get_by_text("+a {} cat & friends on a red table").wait_for()
    press(page, "Write")
    wait_until((clone / "data/concepts/tom/02.txt").is_file)
    page.get_by_text("caption: sidecar").wait_for()
    press_in_row(page, "03.png", "Paint the mask")
    canvas = page.locator(".nicegui-interactive-image, .q-dialog img").last
    canvas.wait_for()
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 60, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    shoot(page, "paint")
    press(page, "Write the mask")
    wait_until((clone / "data/concepts/tom/03.png.mask.png").is_file)
    page.get_by_text("mask: file").wait_for()
    for photo in ("05.png", "04.png"):  # three are too few for the stages, and can still be brought back
        press_in_row(page, photo, "Set aside")
        page.get_by_text(f"{photo} is set aside").wait_for()
        assert not (clone / "data/concepts/tom" / photo).exists()
    page.get_by_text("download.minimum is 4").first.wait_for()
    for photo in ("04.png", "05.png"):
        page.get_by_role("button", name="Bring back").first.press("Enter")  # also where a message lies over it
        page.get_by_label(f"Caption of {photo}").wait_for()


def press_in_row(page, photo: str, name: str) -> None:
    row = page.locator(".q-card .row").filter(has=page.get_by_label(f"Caption of {photo}"))
    row.get_by_role("button", name=name).last.click()


def train(page, clone: Path) -> None:
    tab(page, "Learn")
    press(page, "Run")
    page.get_by_text(re.compile("train: [1-9]\\d* of 250")).wait_for(timeout=3 * MINUTES)
    press(page, "Stop")
    page.get_by_text("was stopped").wait_for()
    assert list(clone.glob(".checkpoints/*/step-*"))
    page.get_by_label("train.max_steps").fill("30")
    press(page, "Run")
    page.get_by_text("+  max_steps: 30").wait_for()
    press(page, "Write")
    page.get_by_text(re.compile("train: [1-9]\\d* of 30")).wait_for(timeout=3 * MINUTES)
    shoot(page, "learn")
    page.reload()  # the run goes on, and is found
    tab(page, "Learn")
    page.get_by_text("The pipeline is running.").wait_for()
    page.get_by_text("has finished").wait_for(timeout=10 * MINUTES)
    assert params(clone)["train"]["max_steps"] == 30
    assert "continuing" not in (clone / ".customdiff/run.log").read_text()  # 30 steps are another run than 250


def draw(page) -> tuple[float, float]:
    tab(page, "Play")
    seconds = []
    for number in (1, 2):
        page.get_by_label("Prompt").fill(f"photo of a <new1> cat on a blue background, {number}")
        started = time.monotonic()
        press(page, "Draw")
        page.get_by_alt_text(re.compile(f"^base model: .*, {number}$")).wait_for(timeout=3 * MINUTES)
        seconds.append(time.monotonic() - started)
    shoot(page, "play")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").first.click()
    assert download.value.suggested_filename == "customdiff-seed42.png"
    return seconds[0], seconds[1]


def test_bad_files_are_refused_by_name(page, clone, tmp_path):
    files, before = page.locator("input[type=file]"), (clone / "params.yaml").read_bytes()
    (tmp_path / "notes.jpg").write_text("only text")
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_bytes(b"<html>")
    files.set_input_files([tmp_path / "notes.jpg", tmp_path / "<img src=x onerror=alert(1)>.png", PHOTOS[0]])
    page.get_by_text("notes.jpg: not an image").wait_for()
    page.get_by_text("img-src-x-onerror-alert-1-.png: not an image but a web page").wait_for()
    page.get_by_role("button", name="Leave out").wait_for()
    assert page.get_by_role("button", name="Leave out").count() == 1
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(400_000_000)
    files.set_input_files(tmp_path / "large.png")
    page.get_by_text("of at most 64 MB each").wait_for()
    for number in range(200):
        shutil.copy(PHOTOS[0], tmp_path / f"{number}.png")
    files.set_input_files([tmp_path / f"{number}.png" for number in range(200)])
    page.get_by_text("at most 100 photos").last.wait_for()
    page.get_by_text("left out: download.maximum is 100").wait_for()
    page.get_by_role("button", name="Leave out").nth(99).wait_for()
    page.get_by_label("Name").fill("../../x")
    press(page, "Show captions, masks and the change")
    page.get_by_text("NAME: '../../x' must be of lower-case letters").wait_for()
    assert sorted(path.name for path in clone.rglob("*") if "onerror" in path.name or path.name == "x") == []
    assert (clone / "params.yaml").read_bytes() == before


def test_an_edit_from_outside_is_not_overwritten(page, clone, browser, address):
    path = clone / "params.yaml"
    tab(page, "Learn")
    page.get_by_label("base.seed").fill("43")
    other = browser.new_page()
    other.goto(address)
    tab(other, "Learn")
    other.get_by_label("base.seed").fill("44")
    press(other, "Show and write the change")
    press(other, "Write")
    wait_until(lambda: params(clone)["base"]["seed"] == 44)
    theirs = path.read_bytes()
    page.get_by_text("params.yaml was edited outside this page").wait_for()
    press(page, "Show and write the change")
    press(page, "Write")
    page.get_by_text("was edited outside; nothing was written").wait_for()
    page.get_by_text("+  seed: 44").wait_for()
    assert path.read_bytes() == theirs
    press(page, "Load params.yaml again")
    wait_until(lambda: page.get_by_label("base.seed").input_value() == "44")
    other.close()


def test_markup_in_prompts_is_text(page):
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    tab(page, "Play")
    page.get_by_label("Prompt").fill("<img src=x onerror=alert(1)> <new1> cat")
    press(page, "Draw")
    page.get_by_text("<img src=x onerror=alert(1)> <new1> cat").first.wait_for(timeout=3 * MINUTES)
    assert page.locator("img[src=x]").count() == 0
    assert alerts == []


def test_a_pipeline_in_another_terminal_is_named(page, clone):
    command = [*project.DVC, "repro", "--force"]
    other = subprocess.Popen(command, cwd=clone, env=environment(clone), start_new_session=True)
    try:
        tab(page, "Learn")
        page.get_by_text(re.compile(f"Process {other.pid} .*dvc repro.* in another terminal")).wait_for()
        assert page.get_by_role("button", name="Run", exact=True).is_disabled()
    finally:
        os.killpg(other.pid, signal.SIGINT)
        other.wait(60)
    page.get_by_role("button", name="Run", exact=True, disabled=False).wait_for()


@pytest.mark.parametrize("path", ["/report/../../params.yaml", "/params.yaml", "/data/base/README.md", "/%2e%2e/etc/x"])
def test_no_file_of_the_machine_is_served(address, path, clone):
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert b"404" in answer.split(b"\r\n")[0]
    assert b"concepts:" not in answer
    assert b"root:" not in answer


def test_other_machines_need_the_token(browser, clone):
    with served(clone, "--host", "0.0.0.0") as found:
        assert re.fullmatch(r"http://0\.0\.0\.0:\d+/\?token=[\w-]{32}", found)
        local = found.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(local.partition("?")[0])
        page = browser.new_page()
        page.goto(local)
        page.get_by_role("heading", name="Add a concept").wait_for(timeout=MINUTES)
        assert "token" not in page.url
        page.close()
