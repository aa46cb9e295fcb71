"""Tags of a run name the commit, the experiment, the user and the program."""

import subprocess

from customdiff import provenance

LOCK = "stages: {}\n"


def test_commit_changes_and_experiment(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_EXP_NAME", "lower-lr")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "dvc.lock").write_text(LOCK)
    for command in (["init", "-q"], ["add", "dvc.lock"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    tags = provenance.run_tags(tmp_path)
    expected = {"git.commit": commit, "git.dirty": "false", "dvc.experiment": "lower-lr"}
    assert tags.items() >= expected.items()
    assert tags["mlflow.user"]
    assert not tags["mlflow.source.name"].startswith("/")
    (tmp_path / "dvc.lock").write_text(LOCK + "\n")
    assert provenance.run_tags(tmp_path)["git.dirty"] == "true"


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not any("git" in key for key in provenance.run_tags(tmp_path))
