"""What a remote in a folder and in S3 gives to a colleague, and which stages come from DVC's run cache."""

import shutil
from pathlib import Path

import pytest
from test_pipeline import DVC, GIT, run

# One stage of each kind that dvc.yaml has; ran.txt lists the commands that ran.
STAGES = """
stages:
  prepare:
    cmd: echo prepare >> ../ran.txt && cp setting.txt views.txt
    deps: [setting.txt]
    outs: [views.txt: {persist: true}]
  train:
    cmd: echo train >> ../ran.txt && mkdir -p adapter && cp setting.txt adapter/weights
    deps: [setting.txt, views.txt]
    outs: [adapter]
  evaluate:
    cmd: >-
      echo evaluate >> ../ran.txt && cp adapter/weights metrics.json
      && (cat adapter/weights; echo summary) > summary.json
    deps: [adapter]
    outs: [metrics.json]
    metrics: [summary.json: {cache: false}]
"""
ALL = {"prepare", "train", "evaluate"}


def project(folder: Path, remote: str, **options: str) -> Path:
    """Anna's project, committed before its first run, with a default remote."""
    anna = folder / "anna"
    anna.mkdir()
    run(anna, "git", "init", "--quiet")
    run(anna, *DVC, "init", "--quiet")
    run(anna, *DVC, "remote", "add", "--quiet", "--default", "team", remote)
    for key, value in options.items():
        run(anna, *DVC, "remote", "modify", "team", key, value)
    (anna / "dvc.yaml").write_text(STAGES)
    (anna / ".gitignore").write_text("views.txt\nadapter\nmetrics.json\n")
    commit(anna)
    return anna


def commit(anna: Path) -> None:
    run(anna, "git", "add", "--all")
    run(anna, *GIT, "commit", "--quiet", "-m", "Run")


def clone_of(anna: Path, name: str) -> Path:
    run(anna.parent, "git", "clone", "--quiet", "anna", name)
    return anna.parent / name


def repro(project: Path, setting: str, *options: str, **environment: str) -> set[str]:
    """The stages whose commands ran."""
    ran = project.parent / "ran.txt"
    ran.unlink(missing_ok=True)
    (project / "setting.txt").write_text(setting)
    run(project, *DVC, "repro", *options, **environment)
    return set(ran.read_text().split()) if ran.exists() else set()


def test_the_run_cache_of_a_remote_has_outputs_that_were_pushed(tmp_path):
    """`dvc push --run-cache` sends records of all runs, outputs of the work tree alone, and none that are in Git."""
    anna = project(tmp_path, str(tmp_path / "store"))
    ben, clara = clone_of(anna, "ben"), clone_of(anna, "clara")
    assert repro(anna, "not-pushed") == ALL
    assert repro(anna, "pushed") == ALL
    run(anna, *DVC, "push", "--run-cache")
    assert repro(anna, "not-pushed") == {"prepare"}  # the others are in her own run cache
    assert repro(ben, "pushed", "--pull") == {"prepare", "evaluate"}
    assert repro(ben, "not-pushed", "--pull") == ALL

    shutil.copytree(anna / ".dvc/cache", tmp_path / "store", dirs_exist_ok=True)
    assert repro(clara, "not-pushed", "--pull") == {"prepare"}
    assert (clara / "adapter/weights").read_text() == (clara / "metrics.json").read_text() == "not-pushed"
    assert (clara / "summary.json").read_text() == "not-pushedsummary\n"


@pytest.fixture
def s3(monkeypatch):
    """Address of moto's S3 with the bucket `team`."""
    reason = (
        'run `uv pip install -e ".[s3-tests]"`: not in requirements/lock.txt, because botocore needs python-dateutil<3'
    )
    pytest.importorskip("dvc_s3", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import boto3

    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="team")
    yield address
    server.stop()


@pytest.mark.slow
def test_two_clones_share_outputs_through_s3(s3, tmp_path):
    anna = project(tmp_path, "s3://team/customdiff", endpointurl=s3)
    assert repro(anna, "first") == ALL
    commit(anna)
    ben = clone_of(anna, "ben")
    run(anna, *DVC, "push", "--run-cache")
    run(ben, *DVC, "pull")
    for name in ("views.txt", "adapter/weights", "metrics.json"):
        assert (ben / name).read_text() == "first"
    assert repro(ben, "first") == set()

    assert repro(anna, "second") == ALL
    run(anna, *DVC, "push", "--run-cache")
    assert repro(ben, "second", "--pull") == {"prepare", "evaluate"}
