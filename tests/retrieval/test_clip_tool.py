"""clip-retrieval's process ends with the stage that started it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="needs a request to the Linux kernel")
def test_the_worker_does_not_outlive_its_stage(tmp_path):
    worker = (
        "import os, time; open('pid.new', 'w').write(str(os.getpid())); os.rename('pid.new', 'pid'); time.sleep(60)"
    )
    stage = (
        "import sys; from pathlib import Path; from customdiff.retrieval import clip_tool\n"
        f"clip_tool.run([sys.executable, '-c', {worker!r}], ['inference'], Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", stage, str(tmp_path)]) as running:
        deadline = time.monotonic() + 30
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        running.kill()
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that was killed may stay as a zombie until the system has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
