"""One real Prefect server for all flow tests, and a real process worker."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prefect_site import START_SECONDS, Site, end, wait_for


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A Prefect server of our own with everything deployed on it."""
    folder = tmp_path_factory.mktemp("site")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MFLOW_"))}
    settings = {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MFLOW_ARTIFACTS": str(folder / "store"),
        "MFLOW_CACHE": str(folder / "cache"),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    site = Site(folder, folder / "store", kept | settings, api)
    process = site.start("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.txt")
    try:
        from flows.server import answers

        wait_for(lambda: answers(api), "the server answers", START_SECONDS)
        deployed = site.command("mflow", "deploy")
        assert deployed.returncode == 0, deployed.stderr
        yield site
    finally:
        end(process)


@pytest.fixture(scope="session")
def worker(server: Site) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker on pool local."""
    process = server.start("prefect", "worker", "start", "--pool", "local", "--type", "process", log="worker.txt")
    try:
        yield process
    finally:
        end(process)


@pytest.fixture(scope="session")
def built(server: Site) -> dict[str, Any]:
    """What the first run of the tiny chain said."""
    code, said, errors = server.run(server.recipe())
    assert code == 0, errors
    return said
