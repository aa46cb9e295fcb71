"""Two users at once against one MLflow server: neither loses a run, a model version or the champion."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, random_adapter

USER = """
import json, sys
from pathlib import Path
from customdiff import tracking
from customdiff.config import Params
from customdiff.publishing import registry

base, learned, name, quality = sys.argv[1:]
concept = {"source": {"path": "cats"}, "modifier_token": "<new1>", "class_prompt": "cat", "instance_prompt": "a {}"}
params = Params.model_validate({"base": {"model": base}, "concepts": {"cat": concept}})
for turn in range(3):
    value = float(quality) + turn / 10
    figure = {"base": 0.1, "adapter": value, "delta": 0, "delta_low": 0, "delta_high": 0}
    figures = {"text_alignment": figure, "image_alignment": figure}
    results = Path(name)
    results.mkdir(exist_ok=True)
    metrics = figures | {"concepts": {"cat": figures}, "num_prompts": 1, "num_images": 1}
    (results / "metrics.json").write_text(json.dumps(metrics))
    with tracking.start(params.tracking, name) as tracker:
        tracker.metrics({"loss": 1.0}, 1)
        judged = registry.Judged(["Good."], {}, {}, 1.0)
        assert registry.log_evaluation(tracker, params, results, Path(learned), ["a cat"], judged)
"""


@pytest.fixture
def address(tmp_path):
    """An `mlflow server`, or the one that CUSTOMDIFF_TEST_SERVER names, such as one with Postgres."""
    if os.environ.get("CUSTOMDIFF_TEST_SERVER"):
        yield os.environ["CUSTOMDIFF_TEST_SERVER"]
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.mark.slow
def test_two_users_log_to_one_server(address, tiny_base, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    learned = random_adapter(tiny_base, tmp_path / "adapter")
    settings = os.environ | {"MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    users = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(tiny_base), str(learned), name, quality],
            cwd=tmp_path,
            env=settings,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, quality in (("anna", "0.4"), ("ben", "0.45"))
    ]
    errors = [user.communicate(timeout=500)[1] for user in users]
    assert [user.returncode for user in users] == [0, 0], errors
    assert not any("warning" in error for error in errors), errors
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("customdiff")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs)[-6:] == ["anna"] * 3 + ["ben"] * 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    versions = client.search_model_versions("name = 'customdiff-cat'")
    assert len(versions) == len(runs)
    champion = client.get_model_version_by_alias("customdiff-cat", "champion")
    assert float(champion.tags["customdiff.score"]) == pytest.approx(0.65)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    from customdiff.publishing import registry

    folder = registry.download("models:/customdiff-cat@champion")
    assert {path.suffix for path in Path(folder).iterdir()} == {".json", ".safetensors"}
