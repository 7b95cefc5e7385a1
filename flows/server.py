"""Which Prefect API a command talks to: the one named, the one of `mflow up`, or Prefect's temporary server."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_CLI_PROMPT": "false",
}
RECORD = "mflow-up.json"


def prefect_home() -> Path:
    """Where Prefect keeps its database and profiles."""
    return Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect").expanduser()


def answers(api_url: str, seconds: float = 2.0) -> bool:
    """Whether a Prefect server is healthy at ``api_url``."""
    try:
        with urllib.request.urlopen(f"{api_url.rstrip('/')}/health", timeout=seconds) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


def running_server() -> str | None:
    """API URL of a server that answers: the one in ``PREFECT_API_URL``, else the one that `mflow up` started."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url if answers(url) else None
    try:
        url = json.loads((prefect_home() / RECORD).read_text(encoding="utf-8"))["api"]
    except (OSError, ValueError, KeyError):
        return None
    return url if answers(url) else None


def prepare_environment() -> None:
    """Settle, before Prefect is imported, which API this process uses.

    An API named in the environment is used even when it does not answer: the error then is Prefect's, and clear.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" in os.environ:
        return
    if url := running_server():
        os.environ["PREFECT_API_URL"] = url
