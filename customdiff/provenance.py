"""Provenance tags of a run: program, user, git commit, uncommitted changes and DVC experiment."""

import getpass
import os
import subprocess
import sys
from pathlib import Path


def run_tags(project: Path | str = ".") -> dict[str, str]:
    """Provenance tags of a run in the project folder `project`.

    Returns:
        MLflow's tags for user, program, commit and branch, `git.commit`, `git.dirty` and `dvc.experiment`; unknown ones
        are omitted.
    """
    project = Path(project)
    tags = {"mlflow.user": _user(), "mlflow.source.name": _program(), "mlflow.source.type": "LOCAL"}
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = tags["git.commit"] = commit
        tags["mlflow.source.git.branch"] = _git(project, "rev-parse", "--abbrev-ref", "HEAD")
        tags["git.dirty"] = str(bool(_git(project, "status", "--porcelain", "--untracked-files=no"))).lower()
    if os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return {key: value for key, value in tags.items() if value}


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for the user in a container
        return ""


def _program() -> str:
    """The running script, such as `stages/train.py`; without folders of this machine."""
    script = Path(sys.argv[0])
    return script.name if script.is_absolute() else script.as_posix()


def _git(project: Path, *arguments: str) -> str:
    command = ["git", "-C", str(project), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
