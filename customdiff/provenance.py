"""Provenance tags of a run: git commit, uncommitted changes, DVC experiment and hashes of data."""

import os
import subprocess
from pathlib import Path

import yaml

DATA_STAGES = ("download-data", "retrieve-class-images", "prepare")


def run_tags(project: Path | str = ".") -> dict[str, str]:
    """Provenance tags of a run in the project folder `project`.

    Returns:
        `git.commit`, `git.dirty`, `dvc.experiment` and `data.<path>`; unknown ones are omitted.
    """
    project = Path(project)
    tags = {}
    commit = _git(project, "rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = tags["git.commit"] = commit
        tags["git.dirty"] = str(bool(_git(project, "status", "--porcelain", "--untracked-files=no"))).lower()
    if os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return tags | data_hashes(project / "dvc.lock")


def data_hashes(lock: Path) -> dict[str, str]:
    """MD5 of each output of the data stages in dvc.lock, as tags `data.<path>`."""
    try:
        stages = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]
        return {
            f"data.{out['path'].removeprefix('data/')}": out["md5"]
            for name, stage in stages.items()
            if name.partition("@")[0] in DATA_STAGES
            for out in stage.get("outs", [])
            if "md5" in out
        }
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}


def _git(project: Path, *arguments: str) -> str:
    command = ["git", "-C", str(project), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
