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
from customdiff.tracking import pictures

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
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "1")


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
    with tracking.start(params().tracking, "a run", store=store, tags={"kind": "test"}) as tracker:
        tracker.params(params())
        for step in range(1, 2501):  # more than MLflow takes in one batch
            tracker.metrics({"loss": 1 / step, "train/images_per_second": 2.0, "unknown": None}, step)
        tracker.image(Image.new("RGB", (8, 8), "red"), "images/<new1> cat", 50)
        tracker.artifact(file)
        tracker.artifact(folder)
        tracker.artifact(tmp_path / "absent.txt")
        tracker.tags({"more": "yes"})
    run = read.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    assert run.data.params["train.learning_rate"] == "1e-05"
    assert run.data.params["concepts.cat.modifier_token"] == "<new1>"
    assert not any(key.startswith("evaluate.") for key in run.data.params)
    assert run.data.tags.items() >= {"kind": "test", "more": "yes"}.items()
    history = read.get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 2501)]
    assert set(run.data.metrics) == {"train/loss", "train/images_per_second"}
    names = {item.path for item in read.list_artifacts(tracker.run_id)}
    assert names >= {"report.html", "adapter"}
    (image,) = images(read, tracker.run_id)
    assert image.startswith("images/images~new1 cat+step+50+")
    assert Path(store / "mlartifacts") in Path(run.info.artifact_uri.removeprefix("file://")).parents
    experiment = read.get_experiment(run.info.experiment_id)
    assert experiment.name == "customdiff"


def images(read, run_id):
    """Logged images, which MLflow writes in the background."""
    for _ in range(50):
        found = [item.path for item in read.list_artifacts(run_id, "images") if item.path.endswith(".png")]
        if found:
            return found
        time.sleep(0.1)
    return []


def test_evaluation_adds_to_the_training_run_once_and_then_opens_its_own(store, read, tmp_path):
    run_file = tmp_path / "run.json"
    with tracking.start(params().tracking, "a run", store=store) as training:
        training.params(params())
        training.write_run_id(run_file)
    settings = params(evaluate={"steps": 7})
    with tracking.for_evaluation(settings.tracking, run_file, tmp_path, "a run", store=store) as first:
        first.params(settings, evaluation=True)
        first.metrics({tracking.EVALUATED: 0.7}, group="")
    assert first.run_id == training.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["evaluate.steps"] == "7"
    assert run.data.metrics[tracking.EVALUATED] == 0.7
    assert run.info.status == "FINISHED"
    with tracking.for_evaluation(params().tracking, run_file, tmp_path, "a run", store=store) as second:
        pass
    assert second.run_id != first.run_id
    assert read.get_run(second.run_id).data.tags[tracking.TRAINING_RUN] == training.run_id


def test_evaluation_leaves_the_run_of_another_adapter_alone(store, tmp_path):
    """DVC has restored the adapter of an earlier training: the run file names the run of the later one."""
    run_file, weights = tmp_path / "run.json", tmp_path / "adapter/weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"later")
    with tracking.start(params().tracking, "a run", store=store) as training:
        training.write_run_id(run_file)
    tracking.add_adapter(run_file, weights.parent)
    weights.write_bytes(b"earlier")
    with tracking.for_evaluation(params().tracking, run_file, weights.parent, "a run", store=store) as tracker:
        assert tracker.run_id != training.run_id
    weights.write_bytes(b"later")
    with tracking.for_evaluation(params().tracking, run_file, weights.parent, "a run", store=store) as tracker:
        assert tracker.run_id == training.run_id


def test_images_with_long_names_are_kept_apart(store, read):
    names = ["a <new1> cat " + "very " * 50 + end for end in ("near", "far")]
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        for name in names:
            tracker.image(Image.new("RGB", (4, 4)), name)
    assert len({path.partition("+step+")[0] for path in images(read, tracker.run_id)}) == 2


@pytest.mark.parametrize(("error", "status"), [(Interrupted(15), "KILLED"), (UserError("x"), "FAILED")])
def test_the_status_tells_how_a_run_ended(store, read, error, status):
    with pytest.raises(type(error)), tracking.start(params().tracking, "a run", store=store) as tracker:
        raise error
    assert read.get_run(tracker.run_id).info.status == status


@pytest.mark.parametrize(
    "text", [None, "not json", '{"run_id": null}', '{"run_id": "0123456789abcdef0123456789abcdef"}']
)
def test_evaluation_without_its_training_run_opens_one(store, tmp_path, text):
    run_file = tmp_path / "run.json"
    if text:
        run_file.write_text(text)
    with tracking.for_evaluation(params().tracking, run_file, tmp_path, "a run", store=store) as tracker:
        assert tracker.run_id


def test_a_resumed_run_continues_and_keeps_its_parameters(store, read):
    with tracking.start(params().tracking, "a run", store=store) as first:
        first.params(params())
        first.metrics({"loss": 2.0}, 1)
    with tracking.resume(params().tracking, first.run_id, "a run", store=store) as second:
        second.params(params(train={"max_steps": 3}))
        second.metrics({"loss": 1.0}, 2)
    assert second.run_id == first.run_id
    run = read.get_run(first.run_id)
    assert run.data.params["train.max_steps"] == "250"
    assert [point.value for point in read.get_metric_history(first.run_id, "train/loss")] == [2.0, 1.0]
    assert tracking.resume(params().tracking, "f" * 32, "a run", store=store).run_id != "f" * 32


def paired(base, adapter):
    delta = adapter - base
    return {"base": base, "adapter": adapter, "delta": delta, "delta_low": delta - 1, "delta_high": delta + 1}


def test_metrics_of_several_concepts_have_their_names():
    overall, cat, pot = paired(1, 3), paired(0, 2), paired(2, 4)
    accuracy = {"base": 0.5, "adapter": 0.6}  # has no interval
    concepts = {"cat": {"image_alignment": cat, "prompt_accuracy": accuracy}, "pot": {"image_alignment": pot}}
    one = tracking.evaluation_metrics({"image_alignment": overall, "num_prompts": 9, "concepts": {"cat": {}}})
    assert one == {"evaluation/image_alignment": 3, "evaluation/image_alignment_delta": 2}
    both = tracking.evaluation_metrics({"image_alignment": overall, "num_prompts": 9, "concepts": concepts})
    assert both.items() > one.items()
    assert not any("accuracy" in name for name in both)
    assert (both["evaluation/image_alignment.cat"], both["evaluation/image_alignment_delta.pot"]) == (2, 2)


def test_mlflow_takes_the_metrics_of_prompts_with_two_concepts(store, read):
    concepts = {name: {"image_alignment": paired(0, 2)} for name in ("cat", "pot", "cat+pot")}
    concepts["cat+pot"]["each"] = {"cat": {"identity": paired(0, 3)}}
    metrics = tracking.evaluation_metrics({"image_alignment": paired(1, 3), "concepts": concepts})
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        tracker.metrics(metrics)
    logged = read.get_run(tracker.run_id).data.metrics
    assert metrics.items() <= logged.items()
    assert logged["evaluation/image_alignment.cat and pot"] == 2
    assert logged["evaluation/identity.cat in cat and pot"] == 3


def test_failed_and_interrupted_runs_have_their_status(store, read):
    for error, status in ((RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracking.start(params().tracking, "a run", store=store) as tracker:
            raise error
        assert read.get_run(tracker.run_id).info.status == status


def test_long_values_are_truncated_and_no_environment_is_logged(store, read, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    long = params(evaluate={"prompts": "a cat " * 2000})
    with tracking.start(long.tracking, "a run", store=store) as tracker:
        tracker.params(long, evaluation=True)
    run = read.get_run(tracker.run_id)
    assert len(run.data.params["evaluate.prompts"]) == 6000
    assert "hf_very_secret" not in str(run.to_dictionary())


def test_a_queued_experiment_writes_to_the_projects_own_store(store, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(store))
    with tracking.start(params().tracking, "a run") as tracker:
        pass
    assert read.get_run(tracker.run_id).info.status == "FINISHED"
    assert list(tmp_path.iterdir()) == []


def test_a_run_has_the_parameters_that_differ_from_their_defaults():
    chosen = tracking.run_params(params(train={"prior_loss_weight": 0.3, "max_steps": 250}, prepare={"views": 40}))
    assert chosen["train.prior_loss_weight"] == "0.3"
    assert chosen["train.max_steps"] == "250"  # a default that every run shows
    assert chosen["concepts.cat.class_prompt"] == "cat"
    assert "train.optimizer" not in chosen
    assert not any(key.startswith("tracking.") or value == "null" for key, value in chosen.items())


def test_names_and_descriptions_of_runs(monkeypatch):
    both = {"cat": CONCEPT, "pot": CONCEPT | {"modifier_token": "<new2>"}}
    assert tracking.run_name(params()) == "cat · custom_diffusion · 250 steps"
    monkeypatch.setenv("DVC_EXP_NAME", "lower-lr")
    assert tracking.run_name(params(concepts=both)) == "lower-lr · cat+pot · custom_diffusion · 250 steps"
    metrics = {"image_alignment": paired(1, 3), "num_prompts": 9, "num_images": 27, "concepts": {"cat": {}}}
    text = tracking.evaluation_description(params(), metrics, ["The subject is learned."], ["![x](y)"], 2.0)
    assert text.startswith("**The subject is learned.**")
    assert "| 1.000 | **3.000** | +2.000 (+1.000 to +3.000) |" in text
    assert "![x](y)" in text
    assert "`<new1> cat`" in text


def test_validation_images_are_shown_by_step(tmp_path):
    for name, color in (("step000000-prompt0-0", "red"), ("step000125-prompt0-0", "blue"), ("none", "green")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{name}.png")
    sheet = Image.open(pictures.validation_sheet(tmp_path, tmp_path / "out.jpg"))
    colors = [sheet.getpixel((x, 24 + 64)) for x in (64, 134 + 64)]
    assert colors[0][0] > 240 > 20 > colors[0][2]
    assert colors[1][2] > 240 > 20 > colors[1][0]
    assert pictures.validation_sheet(tmp_path / "absent", tmp_path / "out.jpg") is None


def test_the_experiment_has_a_kind_and_a_description(store, read):
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        pass
    tags = read.get_experiment(read.get_run(tracker.run_id).info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "image_alignment" in tags["mlflow.note.content"]


def test_data_sets_have_the_digests_of_dvc(store, read, tmp_path):
    """Only those of the concepts in params.yaml, whatever else lies in data/."""
    for name in ("instances/cat/0.png", "instances/cat/0.txt", "classes/cat/images/1.jpg", "instances/dog/0.png"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    secret = CONCEPT | {"source": {"url": "https://anna:hunter2@example.org/cats.zip?token=abc"}}
    sets = tracking.training_sets(params(concepts={"cat": secret}), tmp_path / "data")
    prompts = tracking.prompt_set("prompts", ["a cat", "the cat"], 6)
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        tracker.inputs([*sets, prompts])
    inputs = read.get_run(tracker.run_id).inputs.dataset_inputs
    found = {each.dataset.name: (each.dataset, each.tags[0].value) for each in inputs}
    assert set(found) == {"cat instance images", "cat class images", "evaluation prompts"}
    dataset, context = found["cat instance images"]
    assert (dataset.digest, context) == (dvc_digest(tmp_path / "data/instances/cat"), "training")
    assert json.loads(dataset.source) == {"url": "https://example.org/cats.zip?***"}
    assert json.loads(dataset.profile) == {"images": 1}
    dataset, context = found["evaluation prompts"]
    assert (json.loads(dataset.profile), context) == ({"prompts": 2, "images": 6}, "evaluation")


def dvc_digest(folder):
    """The hash that DVC's own code gives a folder."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.db.local import LocalHashFileDB
    from dvc_objects.fs.local import LocalFileSystem

    fs = LocalFileSystem()
    return build(LocalHashFileDB(fs, str(folder.parent / "odb")), str(folder), fs, "md5")[2].hash_info.value


def test_a_parent_has_a_child_for_each_part(store, read):
    settings = params().tracking
    with tracking.start(settings, "sweep", store=store) as parent:
        for step in (50, 100):
            tracking.log_child(settings, parent, f"step {step}", {"score": step / 2}, {"step": str(step)}, store=store)
    experiment = read.get_run(parent.run_id).info.experiment_id
    children = read.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert {(child.info.run_name, child.data.metrics["evaluation/score"]) for child in children} == {
        ("step 50", 25.0),
        ("step 100", 50.0),
    }
    assert {child.info.status for child in children} == {"FINISHED"}


def test_system_metrics_follow_the_switch_of_mlflow(store, read, monkeypatch):
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        tracker.monitor_system()
        time.sleep(1)
    assert any(name.startswith("system/cpu") for name in read.get_run(tracker.run_id).data.metrics)


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
    tracker = tracking.start(params(tracking={"enabled": False}).tracking, "a run", store=tmp_path / "project")
    (tmp_path / "project").mkdir()
    use(tracker, tmp_path)
    tracker.write_run_id(tmp_path / "run.json")
    assert tracker.run_id is None
    assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": None, "experiment_id": None}
    assert list((tmp_path / "project").iterdir()) == []
    assert capsys.readouterr().err == ""


def test_no_part_of_a_long_password_is_printed(capsys):
    secret = "s3cret" * 40
    tracking.store.warn("http://host", f"cannot reach http://anna:{secret}@host:9/api", "this run is not tracked")
    assert "s3cret" not in capsys.readouterr().err


def test_an_unreachable_server_prints_one_warning(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:hunter2@127.0.0.1:{port}")
    use(tracking.start(params().tracking, "a run", store=tmp_path), tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"warning: MLflow at http://127.0.0.1:{port}: ")
    assert error.endswith(" Connection refused; this run is not tracked\n")


def test_an_unresponsive_server_times_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        use(tracking.start(params().tracking, "a run", store=tmp_path), tmp_path)
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
    tracker = tracking.start(params().tracking, "a run", store=tmp_path)
    assert tracker.run_id == "1" * 32
    server.shutdown()
    server.server_close()
    thread.join()
    use(tracker, tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("; the rest of this run is not tracked\n")


def test_what_the_store_refuses_is_left_out_and_the_rest_is_tracked(store, read, tmp_path, capsys):
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        tracker.values({"cat+dog": "refused"})
        tracker.tags({"kept": "yes"})
        tracker.write_run_id(tmp_path / "run.json")
    error = capsys.readouterr().err
    assert "left out of the run" in error
    assert "the rest of this run" not in error
    run = read.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["kept"]) == ("FINISHED", "yes")
    assert json.loads((tmp_path / "run.json").read_text())["experiment_id"] == run.info.experiment_id


def test_a_run_ends_even_if_a_metric_was_lost(store, read, capsys):
    with tracking.start(params().tracking, "a run", store=store) as tracker:
        tracker.metrics({"cat+dog": 1.0})  # MLflow refuses the plus sign, in the background
    assert capsys.readouterr().err.endswith("; the rest of this run is not tracked\n")
    assert read.get_run(tracker.run_id).info.status == "FINISHED"


def test_metrics_return_before_an_unresponsive_server_answers(tmp_path, monkeypatch, capsys):
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = tracking.start(params().tracking, "a run", store=tmp_path)
    server.shutdown()  # accepts connections, and no longer answers
    thread.join()
    before = time.monotonic()
    for step in range(100):
        tracker.metrics({"loss": 1.0}, step)
    assert time.monotonic() - before < 1
    tracker.finish()
    server.server_close()
    assert capsys.readouterr().err.count("\n") == 1


def test_importing_the_module_does_not_import_mlflow():
    code = "import sys, customdiff.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


def test_missing_mlflow_prints_one_warning(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    use(tracking.start(params().tracking, "a run", store=tmp_path), tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
