"""A pool in a tar, served by the real `clip-retrieval back`, gives class images to a pipeline."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, concept_values
from typer.testing import CliRunner

from customdiff import cli
from customdiff.config import Params
from customdiff.errors import UserError
from customdiff.models.clip import Clip
from customdiff.retrieval import class_images, clip_index


def test_a_folder_that_is_not_of_the_service_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.txt").write_text("kept")
    result = CliRunner().invoke(cli.commands, ["serve-index", "--out", "mine"])
    assert isinstance(result.exception, UserError)
    assert "mine exists already" in str(result.exception)
    assert (tmp_path / "mine/photo.txt").read_text() == "kept"


@pytest.mark.slow
def test_a_tar_pool_is_served_on_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pool, clip = ROOT / "data/pool", ROOT / "data/clip"
    clip_index.build_index(pool, str(clip), "data/index")
    settings = {"concepts": {"cat": concept_values()}, "retrieve": {"index": {"pool": str(pool), "clip": str(clip)}}}
    Path("params.yaml").write_text(yaml.safe_dump(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "customdiff.cli", "serve-index", "--port", str(port)]
    with open("server.log", "wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True
        )
    try:
        wait(server, port)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(
                ("127.0.0.2", port), 2
            ).close()  # also this machine, but not the address that it has
        service = {"url": f"http://127.0.0.1:{port}/knn-service", "index_name": "pool", "clip": str(clip)}
        own = settings | {"retrieve": {"backend": "service", "service": service, "num_class_images": 12, "minimum": 12}}
        (tmp_path / "instances").mkdir()
        result = class_images.Retrieved("cat")
        params = Params.model_validate(own)
        found = class_images.from_service(params.retrieve.service, params.download, "cat", 12, None, result)
        images = [image for image, _ in zip(found, range(12), strict=False)]
        assert len(images) == 12
        assert all(image.caption for image in images)
        embeddings = np.load("data/index/img_emb/img_emb_0.npy").astype(float)
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        cosines = embeddings @ class_images.query_vector(Clip.load(str(clip)), "cat")
        assert images[0].similarity == pytest.approx(cosines.max(), abs=0.01)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def wait(server: subprocess.Popen, port: int) -> None:
    """Until the service answers."""
    for _ in range(240):
        assert server.poll() is None, Path("server.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(Path("server.log").read_text())
