"""Tags of a run name the commit, the experiment and the data that went in."""

import subprocess

import pytest

from customdiff import provenance

LOCK = (
    "stages:\n"
    "  prepare@cat:\n    outs:\n    - {path: data/prepared/cat, md5: abc.dir}\n"
    "  evaluate:\n    outs:\n    - {path: results/evaluate, md5: old.dir}\n"
)


def test_commit_changes_experiment_and_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_EXP_NAME", "lower-lr")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "dvc.lock").write_text(LOCK)
    for command in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tags = provenance.run_tags(tmp_path)
    expected = {"git.commit": commit, "git.dirty": "false", "dvc.experiment": "lower-lr"}
    assert tags.items() >= {**expected, "data.prepared/cat": "abc.dir"}.items()
    assert not any("results" in key for key in tags)
    (tmp_path / "dvc.lock").write_text(LOCK + "\n")
    assert provenance.run_tags(tmp_path)["git.dirty"] == "true"


def test_without_git_and_lock_there_are_no_tags(monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.run_tags(tmp_path) == {}


@pytest.mark.parametrize("lock", ["", "stages: 3", "stages: {a: 1}", "{"])
def test_a_damaged_lock_costs_only_its_tags(tmp_path, lock):
    (tmp_path / "dvc.lock").write_text(lock)
    assert provenance.data_hashes(tmp_path / "dvc.lock") == {}
