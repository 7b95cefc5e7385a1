"""The folder of real data, named by MFLOW_REAL_DATA; tests that need it are skipped without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL_DATA = Path(os.environ.get("MFLOW_REAL_DATA", "(MFLOW_REAL_DATA is not set)"))
needs_real_data = pytest.mark.skipif(
    "MFLOW_REAL_DATA" not in os.environ, reason="MFLOW_REAL_DATA does not name the folder of real data"
)
