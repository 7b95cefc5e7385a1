"""lm-eval's Hugging Face backend, with a progress event as requests are answered. Imports lm-eval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from megatron_ext.events import Events

SECONDS_BETWEEN_EVENTS = 0.5


class _Progress(CacheHook):
    """lm-eval hands each answer to the cache hook as soon as it has it; this one counts them."""

    def __init__(self, events: Events) -> None:
        super().__init__(None)
        self._events, self._done, self._last = events, 0, 0.0
        self.total = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        now = time.monotonic()
        if self._done == self.total or now - self._last >= SECONDS_BETWEEN_EVENTS:
            self._last = now
            self._events.progress(self._done, self.total, "requests")


class ObservedLM(HFLM):
    """HFLM that reports how many of its requests are answered, instead of drawing bars."""

    def __init__(self, events: Events, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._progress = _Progress(events)
        self.set_cache_hook(self._progress)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._progress.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        self._progress.total += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        self._progress.total += len(requests)
        return super().generate_until(requests, disable_tqdm=True)
