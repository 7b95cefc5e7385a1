"""Errors that megatron-flows raises on purpose are shown as their message, not as Prefect's tracebacks around it."""

from __future__ import annotations

import logging

from megatron_ext.errors import MegatronFlowsError

LOGGERS = ("prefect.task_runs", "prefect.flow_runs")
FINISHED = "Finished in state"


class OwnErrors(logging.Filter):
    """Shortens the records that Prefect writes about a failed run."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, MegatronFlowsError):
            record.exc_info, record.msg, record.args = None, f"failed: {error}", ()
        elif isinstance(record.msg, str) and record.msg.startswith(FINISHED) and not record.args:
            record.msg = record.msg.split("\\n", 1)[0]
        return True


class NoFarewell(logging.Filter):
    """Drops the temporary server's last words: the outcome of the run is the last thing to be read."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Stopping temporary server")


def quieten() -> None:
    """Add the filters once."""
    for name, wanted in [*((name, OwnErrors()) for name in LOGGERS), ("prefect", NoFarewell())]:
        logger = logging.getLogger(name)
        if not any(isinstance(f, type(wanted)) for f in logger.filters):
            logger.addFilter(wanted)
