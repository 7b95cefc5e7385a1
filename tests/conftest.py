"""For all tests: what megatron-flows keeps between runs goes into a folder of this session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
