"""deploy/compose.yaml names what exists: services, volumes, variables, versions and options of `mlflow server`."""

import re
import shlex
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import ROOT

TEXT = (ROOT / "deploy/compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
MLFLOW, POSTGRES = SERVICES["mlflow"], SERVICES["postgres"]


@pytest.fixture(scope="module")
def server() -> dict:
    """Values of `mlflow server`'s options, as its own parser reads the command."""
    from mlflow.cli import server

    shell, option, script = shlex.split(MLFLOW["command"].replace("$$", "$"))
    assert (shell, option) == ("sh", "-c")
    words = shlex.split(script)
    assert words[:2] == ["mlflow", "server"]
    return server.make_context("server", words[2:]).params


def test_services_and_volumes_are_declared():
    mounts = [mount for service in SERVICES.values() for mount in service.get("volumes", [])]
    assert sorted(mount.split(":")[0] for mount in mounts) == sorted(COMPOSE["volumes"])
    for name, condition in MLFLOW["depends_on"].items():
        assert condition == {"condition": "service_healthy"}
        assert "test" in SERVICES[name]["healthcheck"]
    assert all("image" in service or "build" in service for service in SERVICES.values())


def test_variables_are_the_password_and_what_the_service_sets():
    assert set(re.findall(r"(?<!\$)\$\{(.*?)\}", TEXT)) == {"POSTGRES_PASSWORD:?set POSTGRES_PASSWORD"}
    assert re.findall(r"\$\$(\w+)", TEXT) == ["BACKEND"]
    assert "BACKEND" in MLFLOW["environment"]
    assert "$" not in re.sub(r"\$\{.*?\}|\$\$\w+", "", TEXT)


def test_only_this_machine_reaches_the_port(server):
    assert "ports" not in POSTGRES
    assert [port.split(":") for port in MLFLOW["ports"]] == [["127.0.0.1", "5000", str(server["port"])]]
    assert server["host"] == "0.0.0.0"  # inside the container, so that Docker can forward to it


def test_the_server_writes_to_postgres_and_to_the_volume(server):
    assert server["backend_store_uri"] == "$BACKEND"
    address = urlsplit(MLFLOW["environment"]["BACKEND"].replace("${POSTGRES_PASSWORD:?set POSTGRES_PASSWORD}", "x"))
    settings = POSTGRES["environment"]
    assert (address.hostname, address.username) == ("postgres", settings["POSTGRES_USER"])
    assert address.path == f"/{settings['POSTGRES_DB']}"
    assert server["artifacts_destination"] in [mount.split(":")[1] for mount in MLFLOW["volumes"]]


def test_the_server_has_the_version_of_the_client():
    (locked,) = re.findall(r"^mlflow==(\S+)$", (ROOT / "requirements/lock.txt").read_text(), re.MULTILINE)
    assert re.findall(r"mlflow==([\d.]+)", MLFLOW["build"]["dockerfile_inline"]) == [locked]
    assert re.findall(r"mlflow==([\d.]+)", (ROOT / "docs/tracking.md").read_text()) == [locked]
