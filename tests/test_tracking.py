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


def test_what_is_logged_is_read_back(store, read, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("<p>hello</p>")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.json").write_text("{}")
    with tracking.start(params(), store=store, tags={"kind": "test"}) as tracker:
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
    card = tmp_path / "run.json"
    with tracking.start(params(), store=store) as training:
        training.params(params())
        training.write_run_id(card)
    with tracking.for_evaluation(params(evaluate={"steps": 7}), card, store=store) as first:
        first.params(params(evaluate={"steps": 7}), ["evaluate"])
        first.metrics({tracking.EVALUATED: 0.7}, group="")
    assert first.run_id == training.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["evaluate.steps"] == "7"
    assert run.data.metrics[tracking.EVALUATED] == 0.7
    assert run.info.status == "FINISHED"
    with tracking.for_evaluation(params(), card, store=store) as second:
        pass
    assert second.run_id != first.run_id
    assert read.get_run(second.run_id).data.tags[tracking.TRAINING_RUN] == training.run_id


def test_an_evaluation_is_logged_with_all_that_belongs_to_it(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "dvc.lock", "results/report.html", "results/contact_sheet.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    Path("adapter").mkdir()
    for name in ("adapter.json", "weights.safetensors", "weights.bin"):
        Path("adapter", name).write_text("x")
    figures = {"text_alignment": 0.5, "text_alignment_delta_ci95": [-0.1, 0.2]}
    metrics = {**figures, "num_images": 8, "concepts": {"cat": figures}}
    with tracking.start(params(), store=store) as tracker:
        tracker.evaluation(params(), metrics, Path("results"), Path("adapter"))
    run = read.get_run(tracker.run_id)
    assert run.data.params["evaluate.scheduler"] == "ddim"
    assert run.data.metrics == {
        "text_alignment": 0.5,
        "text_alignment_delta_ci95_low": -0.1,
        "text_alignment_delta_ci95_high": 0.2,
    }
    assert tracking.EVALUATED in run.data.metrics
    folders = (None, "adapter", "evaluate")
    found = {item.path for folder in folders for item in read.list_artifacts(run.info.run_id, folder)}
    assert found == {
        *("adapter", "evaluate", "params.yaml", "dvc.lock"),
        *("adapter/adapter.json", "adapter/weights.safetensors"),
        *("evaluate/report.html", "evaluate/contact_sheet.jpg"),
    }


@pytest.mark.parametrize(
    "text", [None, "not json", '{"run_id": null}', '{"run_id": "0123456789abcdef0123456789abcdef"}']
)
def test_evaluation_without_its_training_run_opens_one(store, tmp_path, text):
    card = tmp_path / "run.json"
    if text:
        card.write_text(text)
    with tracking.for_evaluation(params(), card, store=store) as tracker:
        assert tracker.run_id


def test_a_resumed_run_goes_on_and_keeps_the_parameters_it_began_with(store, read):
    with tracking.start(params(), store=store) as first:
        first.params(params())
        first.metrics({"loss": 2.0}, 1)
    with tracking.resume(params(tracking={"log_every": 3}), first.run_id, store=store) as second:
        second.params(params(tracking={"log_every": 3}))
        second.metrics({"loss": 1.0}, 2)
    assert second.run_id == first.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["tracking.log_every"] == "10"
    assert [point.value for point in read.get_metric_history(first.run_id, "train/loss")] == [2.0, 1.0]
    assert tracking.resume(params(), "f" * 32, store=store).run_id != "f" * 32


def test_figures_of_several_concepts_are_told_apart():
    metrics = {
        "image_alignment": 0.5,
        "seconds": 9,
        "concepts": {"cat": {"image_alignment": 0.4}, "pot": {"image_alignment": 0.6}},
    }
    assert tracking.evaluation_metrics(metrics) == {
        "image_alignment": 0.5,
        "image_alignment.cat": 0.4,
        "image_alignment.pot": 0.6,
    }


def test_a_run_that_fails_or_is_interrupted_says_so(store, read):
    for error, status in ((RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracking.start(params(), store=store) as tracker:
            raise error
        assert read.get_run(tracker.run_id).info.status == status


def test_long_values_are_cut_and_nothing_of_the_environment_is_logged(store, read, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    long = params(train={"validation": {"prompts": ["a cat " * 2000]}})
    with tracking.start(long, store=store) as tracker:
        tracker.params(long)
    run = read.get_run(tracker.run_id)
    assert len(run.data.params["train.validation.prompts"]) == 6000
    assert "hf_very_secret" not in str(run.to_dictionary())


def test_a_run_is_tagged_with_commit_experiment_and_the_data_that_went_in(store, read, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_EXP_NAME", "lower-lr")
    git = ["git", "-C", str(store), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (store / "dvc.lock").write_text(
        "stages:\n"
        "  prepare@cat:\n    outs:\n    - {path: data/prepared/cat, md5: abc.dir}\n"
        "  evaluate:\n    outs:\n    - {path: results/evaluate, md5: old.dir}\n"
    )
    subprocess.run([*git, "add", "dvc.lock"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    with tracking.start(params(), store=store) as clean:
        pass
    (store / "dvc.lock").write_text((store / "dvc.lock").read_text() + "\n")
    with tracking.start(params(), store=store) as dirty:
        pass
    run = read.get_run(clean.run_id)
    assert run.info.run_name == "lower-lr"
    expected = {"git.commit": commit, "git.dirty": "false", "dvc.experiment": "lower-lr"}
    assert run.data.tags.items() >= {**expected, "data.prepared/cat": "abc.dir"}.items()
    assert not any("results" in key for key in run.data.tags)
    assert read.get_run(dirty.run_id).data.tags["git.dirty"] == "true"


@pytest.mark.parametrize("lock", ["", "stages: 3", "stages: {a: 1}", "{", None])
def test_a_damaged_dvc_lock_costs_only_its_tags(tmp_path, lock):
    if lock is not None:
        (tmp_path / "dvc.lock").write_text(lock)
    assert tracking.data_hashes(tmp_path / "dvc.lock") == {}


def test_a_queued_experiment_writes_to_the_projects_own_store(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(store))
    with tracking.start(params()) as tracker:
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
    tracker = tracking.start(params(tracking={"enabled": False}), store=tmp_path / "project")
    (tmp_path / "project").mkdir()
    use(tracker, tmp_path)
    tracker.write_run_id(tmp_path / "run.json")
    assert tracker.run_id is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": None}
    assert list((tmp_path / "project").iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_server_that_is_not_there_costs_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{port}")
    use(tracking.start(params(), store=tmp_path), tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"warning: MLflow at http://127.0.0.1:{port}: ")
    assert error.endswith(" Connection refused; this run is not tracked\n")


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        use(tracking.start(params(), store=tmp_path), tmp_path)
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


def test_a_server_that_dies_midway_costs_one_line_and_no_step_waits(tmp_path, monkeypatch, capsys):
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    tracker = tracking.start(params(), store=tmp_path)
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


def test_without_mlflow_there_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    use(tracking.start(params(), store=tmp_path), tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
