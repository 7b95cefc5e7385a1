"""Makes a Prefect flow of a plain function of stages, and lets its jobs save when the flow is told to stop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flows.quiet import quieten
from tasks.launch.base import STOPPING
from tasks.stage import recording


def as_flow(sentence: Callable[..., Any], name: str) -> Any:
    """``sentence`` as the Prefect flow ``name``.

    When the flow is cancelled or gets SIGTERM or Ctrl-C, its jobs are told to save; the flow ends after them. When a
    stage fails, those beside it are finished first, so that a retry does not repeat them.
    """
    from prefect import flow

    quieten()

    @functools.wraps(sentence)
    def body(*args: Any, **kwargs: Any) -> Any:
        STOPPING.asked.clear()
        with recording(), _stop_reaches_jobs():
            try:
                return sentence(*args, **kwargs)
            except Exception:
                STOPPING.wait()
                raise

    body.__signature__ = inspect.signature(sentence, eval_str=True)  # type: ignore[attr-defined]
    return flow(name=name, description=sentence.__doc__)(body)


@contextmanager
def _stop_reaches_jobs() -> Iterator[None]:
    try:
        yield
    except Exception:
        raise
    except BaseException:  # Prefect's TerminationSignal, KeyboardInterrupt
        STOPPING.asked.set()
        STOPPING.wait()
        raise
