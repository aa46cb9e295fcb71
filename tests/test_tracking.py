"""What is tracked can be read back by MLflow's own client; what cannot be tracked never disturbs the run."""

import json
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from customdiff import tracking
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.interrupts import Interrupted

CONCEPT = {
    "source": {"path": "cats"},
    "modifier_token": "<new1>",
    "class_prompt": "cat",
    "instance_prompt": "photo of a {} cat",
}


def params(**changes):
    return Params.model_validate({"concepts": {"cat": CONCEPT}, **changes})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No tracking settings from outside, and none that leak out."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tracking.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.05)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One local store for all tests of this file: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def read(store):
    """A run as MLflow's own client finds it."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{store / 'mlflow.db'}")


def test_logged_values_can_be_read(store, read, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("<p>hello</p>")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    with tracking.start(params().tracking, store=store, tags={"kind": "test"}) as tracker:
        tracker.params(params())
        for step in range(1, 2501):  # more than MLflow takes in one batch
            tracker.metrics({"loss": 1 / step, "train/images_per_second": 2.0, "unknown": None}, step)
        tracker.image(Image.new("RGB", (8, 8), "red"), "validation/<new1> cat", 50)
        tracker.artifact(file)
        tracker.artifact(folder)
        tracker.artifact(tmp_path / "absent.txt")
        tracker.tags({"more": "yes"})
    run = read.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "1e-05"
    assert run.data.params["concepts.cat.modifier_token"] == "<new1>"
    assert not any(key.startswith("evaluate.") for key in run.data.params)
    assert run.data.tags.items() >= {"kind": "test", "more": "yes"}.items()
    history = read.get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 2501)]
    assert set(run.data.metrics) == {"train/loss", "train/images_per_second"}
    names = {item.path for item in read.list_artifacts(tracker.run_id)}
    assert names == {"report.html", "adapter", "images"}
    assert Path(store / "mlartifacts") in Path(run.info.artifact_uri.removeprefix("file://")).parents
    experiment = read.get_experiment(run.info.experiment_id)
    assert experiment.name == "customdiff"


def test_evaluation_adds_to_the_training_run_once_and_then_opens_its_own(store, read, tmp_path):
    run_file = tmp_path / "run.json"
    with tracking.start(params().tracking, store=store) as training:
        training.params(params())
        training.write_run_id(run_file)
    with tracking.for_evaluation(params(evaluate={"steps": 7}).tracking, run_file, store=store) as first:
        first.params(params(evaluate={"steps": 7}), ["evaluate"])
        first.metrics({tracking.EVALUATED: 0.7}, group="")
    assert first.run_id == training.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["evaluate.steps"] == "7"
    assert run.data.metrics[tracking.EVALUATED] == 0.7
    assert run.info.status == "FINISHED"
    with tracking.for_evaluation(params().tracking, run_file, store=store) as second:
        pass
    assert second.run_id != first.run_id
    assert read.get_run(second.run_id).data.tags[tracking.TRAINING_RUN] == training.run_id


def test_an_evaluation_logs_results_and_adapter(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.lock", "results/report.html", "results/contact_sheet.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    Path("adapter").mkdir()
    for name in ("adapter.json", "weights.safetensors", "weights.bin"):
        Path("adapter", name).write_text("x")
    metrics = {"text_alignment": 0.5, "text_alignment_delta_low": -0.1}
    with tracking.start(params().tracking, store=store) as tracker:
        tracker.evaluation(params(), metrics, Path("results"), Path("adapter"))
    run = read.get_run(tracker.run_id)
    assert run.data.params["evaluate.scheduler"] == "ddim"
    assert run.data.metrics == metrics
    assert tracking.EVALUATED in run.data.metrics
    folders = (None, "adapter", "evaluate")
    found = {item.path for folder in folders for item in read.list_artifacts(run.info.run_id, folder)}
    assert found == {
        *("adapter", "evaluate", "params.yaml", "dvc.lock"),
        *("adapter/adapter.json", "adapter/weights.safetensors"),
        *("evaluate/report.html", "evaluate/contact_sheet.jpg"),
    }


def test_no_secret_of_an_address_is_tracked(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    address = "https://bob:S3cr3t@host.org/knn-service?token=S3cr3t"
    Path("params.yaml").write_text(f"retrieve:\n  service:\n    url: {address}\n")
    for folder in ("adapter", "results"):
        Path(folder).mkdir()
    own = params(retrieve={"service": {"url": address}})
    with tracking.start(own.tracking, store=store) as tracker:
        tracker.evaluation(own, {"loss": float("nan")}, Path("results"), Path("adapter"))
    run = read.get_run(tracker.run_id)
    assert run.data.params["retrieve.service.url"] == "https://host.org/knn-service?***"
    assert run.data.metrics == {}
    assert not [path for path in store.rglob("*") if path.is_file() and b"S3cr3t" in path.read_bytes()]


@pytest.mark.parametrize(("error", "status"), [(Interrupted(15), "KILLED"), (UserError("x"), "FAILED")])
def test_the_status_tells_how_a_run_ended(store, read, error, status):
    with pytest.raises(type(error)), tracking.start(params().tracking, store=store) as tracker:
        raise error
    assert read.get_run(tracker.run_id).info.status == status


@pytest.mark.parametrize(
    "text", [None, "not json", '{"run_id": null}', '{"run_id": "0123456789abcdef0123456789abcdef"}']
)
def test_evaluation_without_its_training_run_opens_one(store, tmp_path, text):
    run_file = tmp_path / "run.json"
    if text:
        run_file.write_text(text)
    with tracking.for_evaluation(params().tracking, run_file, store=store) as tracker:
        assert tracker.run_id


def test_a_resumed_run_continues_and_keeps_its_parameters(store, read):
    with tracking.start(params().tracking, store=store) as first:
        first.params(params())
        first.metrics({"loss": 2.0}, 1)
    with tracking.resume(params(tracking={"log_every": 3}).tracking, first.run_id, store=store) as second:
        second.params(params(tracking={"log_every": 3}))
        second.metrics({"loss": 1.0}, 2)
    assert second.run_id == first.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["tracking.log_every"] == "10"
    assert [point.value for point in read.get_metric_history(first.run_id, "train/loss")] == [2.0, 1.0]
    assert tracking.resume(params().tracking, "f" * 32, store=store).run_id != "f" * 32


def paired(base, adapter):
    delta = adapter - base
    return {"base": base, "adapter": adapter, "delta": delta, "delta_low": delta - 1, "delta_high": delta + 1}


def test_metrics_of_several_concepts_have_their_names():
    overall, cat, pot = paired(1, 3), paired(0, 2), paired(2, 4)
    concepts = {"cat": {"image_alignment": cat}, "pot": {"image_alignment": pot}}
    one = tracking.evaluation_metrics({"image_alignment": overall, "num_prompts": 9, "concepts": {"cat": {}}})
    assert one == {
        "image_alignment": 3,
        "base_image_alignment": 1,
        "image_alignment_delta": 2,
        "image_alignment_delta_low": 1,
        "image_alignment_delta_high": 3,
    }
    both = tracking.evaluation_metrics({"image_alignment": overall, "num_prompts": 9, "concepts": concepts})
    assert both.items() > one.items()
    assert (both["image_alignment.cat"], both["base_image_alignment.pot"]) == (2, 2)


def test_failed_and_interrupted_runs_have_their_status(store, read):
    for error, status in ((RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracking.start(params().tracking, store=store) as tracker:
            raise error
        assert read.get_run(tracker.run_id).info.status == status


def test_long_values_are_truncated_and_no_environment_is_logged(store, read, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    long = params(train={"validation": {"prompts": ["a cat " * 2000]}})
    with tracking.start(long.tracking, store=store) as tracker:
        tracker.params(long)
    run = read.get_run(tracker.run_id)
    assert len(run.data.params["train.validation.prompts"]) == 6000
    assert "hf_very_secret" not in str(run.to_dictionary())


def test_a_queued_experiment_writes_to_the_projects_own_store(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(store))
    with tracking.start(params().tracking) as tracker:
        pass
    assert read.get_run(tracker.run_id).info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def use(tracker, tmp_path):
    """Every method once, and the end."""
    (tmp_path / "file").write_text("x")
    tracker.params(params())
    tracker.metrics({"loss": 1.0}, 1)
    tracker.image(Image.new("RGB", (8, 8)), "image", 1)
    tracker.artifact(tmp_path / "file")
    tracker.tags({"a": "b"})
    tracker.finish()
    tracker.metrics({"loss": 1.0}, 2)
    tracker.finish()


def test_disabled_tracking_does_nothing(tmp_path, capsys):
    tracker = tracking.start(params(tracking={"enabled": False}).tracking, store=tmp_path / "project")
    (tmp_path / "project").mkdir()
    use(tracker, tmp_path)
    tracker.write_run_id(tmp_path / "run.json")
    assert tracker.run_id is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": None}
    assert list((tmp_path / "project").iterdir()) == []
    assert capsys.readouterr().err == ""


def test_an_unreachable_server_prints_one_warning(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{port}")
    use(tracking.start(params().tracking, store=tmp_path), tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"warning: MLflow at http://127.0.0.1:{port}: ")
    assert error.endswith(" Connection refused; this run is not tracked\n")


def test_an_unresponsive_server_times_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        use(tracking.start(params().tracking, store=tmp_path), tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


class Server(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as opening a run asks for."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        run = {"info": {"run_id": "1" * 32, "experiment_id": "1", "status": "RUNNING"}, "data": {}}
        body = {"experiment": {"experiment_id": "1", "name": "customdiff"}, "run": run}
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = answer

    def log_message(self, *arguments):
        pass


def test_a_server_that_stops_prints_one_warning_and_blocks_no_step(tmp_path, monkeypatch, capsys):
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    tracker = tracking.start(params().tracking, store=tmp_path)
    assert tracker.run_id == "1" * 32
    server.shutdown()
    server.server_close()
    thread.join()
    use(tracker, tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("; the rest of this run is not tracked\n")


def test_metrics_return_while_the_store_is_busy():
    released = threading.Event()

    class Busy:
        def log_batch(self, *arguments, **keywords):
            released.wait(30)

        def set_terminated(self, *arguments):
            pass

    tracker = tracking.Tracker(Busy(), "run")
    before = time.monotonic()
    for step in range(100):
        tracker.metrics({"loss": 1.0}, step)
    waited = time.monotonic() - before
    released.set()
    tracker.finish()
    assert waited < 10  # the store holds each batch for 30 s


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, customdiff.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_missing_mlflow_prints_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    use(tracking.start(params().tracking, store=tmp_path), tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
