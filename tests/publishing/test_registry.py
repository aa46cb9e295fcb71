"""Adapters in MLflow's registry: versions, champion, downloads, and images from the server that serves them."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, concept_values, random_adapter
from PIL import Image, ImageChops

from customdiff import tracking
from customdiff.adapters import adapter
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.models import base, sampling
from customdiff.publishing import registry


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_base):
    """An empty project with a store of its own, as the working directory."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT", "CUSTOMDIFF_BASE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tracking.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/instances/cat").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def log(project, tiny_base):
    """Log an evaluation with these alignments; returns the line about its version."""

    def logged(text: float, image: float, prompts=("a cat",), method="custom_diffusion", **settings):
        learned = project / "models/adapter"
        if not learned.exists():
            random_adapter(tiny_base, learned, method=method)
        results = project / "results"
        results.mkdir(exist_ok=True)
        figures = {"text_alignment": paired(text), "image_alignment": paired(image)}
        metrics = figures | {"concepts": {"cat": figures}, "num_prompts": 1, "num_images": 2}
        (results / "metrics.json").write_text(json.dumps(metrics))
        chosen = params(tiny_base, method, **settings)
        with tracking.start(chosen.tracking, "a run") as tracker:
            return registry.log_evaluation(
                tracker, chosen, results, learned, prompts, registry.Judged(["Learned."], {"photo_share": 0.5}, {}, 1.0)
            )

    return logged


def paired(value: float) -> dict:
    return {"base": 0.1, "adapter": value, "delta": value - 0.1, "delta_low": 0.0, "delta_high": 1.0}


def params(tiny_base: Path, method: str = "custom_diffusion", **settings) -> Params:
    return Params.model_validate(
        {
            "base": {"model": str(tiny_base), "device": "cpu"},
            "concepts": {"cat": concept_values()},
            "train": {"method": method, "lora_rank": 2},
            "evaluate": {"steps": 2, "guidance_scale": 2.0},
            "tracking": settings,
        }
    )


def test_the_best_score_is_champion(project, log):
    assert "it is now champion" in log(1.0, 0.5)
    assert "version 1 stays champion" in log(1.0, 0.4)
    assert "it is now champion" in log(0.9, 0.6)
    client = tracking.connect()
    champion = client.get_model_version_by_alias("customdiff-cat", "champion")
    assert int(champion.version) == 3
    run = client.get_run(champion.run_id)
    assert run.data.metrics["evaluation/score"] == pytest.approx(2 * 0.9 * 0.6 / 1.5)
    assert run.data.tags["mlflow.note.content"].startswith("**Learned.**")
    assert "measured with other prompts" in log(2.0, 2.0, prompts=("a dog",))
    assert int(client.get_model_version_by_alias("customdiff-cat", "champion").version) == 3


def test_the_score_of_params_decides(project, log):
    log(1.0, 0.5, score="image_alignment")
    assert "it is now champion" in log(0.1, 0.6, score="image_alignment")


@pytest.mark.parametrize("address", ["models:/customdiff-cat@champion", "models:/customdiff-cat/latest"])
def test_a_registered_adapter_is_downloaded_as_it_was(project, log, address):
    log(1.0, 0.5)
    folder = registry.download(address)
    own = {path.name: path.read_bytes() for path in (project / "models/adapter").iterdir() if path.suffix != ".bin"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == own


def test_an_unknown_model_is_a_users_mistake(project):
    with pytest.raises(UserError, match="models:/customdiff-cat@champion: not in the MLflow store"):
        registry.download("models:/customdiff-cat@champion")


def test_a_lora_adapter_also_has_the_flavor_of_mlflow(project, log):
    log(1.0, 0.5, method="lora")
    client = tracking.connect()
    (experiment,) = client.search_experiments(filter_string="name = 'customdiff'")
    names = {model.name for model in client.search_logged_models([experiment.experiment_id])}
    assert names == {"cat-adapter", "cat-adapter-diffusers"}


@pytest.mark.slow
def test_the_server_draws_what_the_library_draws(project, log, tiny_base):
    log(1.0, 0.5)
    prompts = ["a <new1> cat", "photo of a <new1> cat"]
    with serving(project, "models:/customdiff-cat@champion") as address:
        request = {"inputs": {"prompt": prompts}, "params": {"seed": 7, "steps": 3, "guidance_scale": 1.5}}
        answer = ask(address, request)
        rows = answer["predictions"]
        with pytest.raises(urllib.error.HTTPError):
            ask(address, {"inputs": {"prompt": prompts}, "params": {"num_images": 1000}})
    pipe = base.load_pipeline(params(tiny_base).base)
    sampling.set_scheduler(pipe, "ddim")
    adapter.load(pipe, project / "models/adapter")
    expected = sampling.generate(pipe, prompts, [7, 7], steps=3, guidance_scale=1.5, eta=1.0)
    assert [(row["prompt"], row["seed"]) for row in rows] == [(prompt, 7) for prompt in prompts]
    for row, image in zip(rows, expected, strict=True):
        drawn = Image.open(io.BytesIO(base64.b64decode(row["image"])))
        assert max(high for _, high in ImageChops.difference(drawn, image).getextrema()) <= 1


class serving:
    """`mlflow models serve` of a model, until the block ends."""

    def __init__(self, project: Path, model: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
        settings = os.environ | {
            "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.log = project / "server.log"
        with self.log.open("wb") as log:
            self.server = subprocess.Popen(
                [*command, "--port", str(self.port)],
                cwd=project,
                env=settings,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> str:
        for _ in range(240):
            assert self.server.poll() is None, self.log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5).read()
                return f"http://127.0.0.1:{self.port}/invocations"
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def __exit__(self, *rest: object) -> None:
        os.killpg(self.server.pid, 15)
        self.server.wait(30)


def ask(address: str, request: dict) -> dict:
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(address, json.dumps(request).encode(), headers)
    return json.loads(urllib.request.urlopen(sent, timeout=120).read())
