"""Jobs as processes on this machine, each in a session of its own, guarded by the owner's pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from megatron_ext.guard import OWNERS
from megatron_ext.worker import Job
from tasks.launch.base import JOB, LOG, Handle

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class LocalLauncher:
    """Starts ``python -m megatron_ext.worker JOB.json``; several ranks become a torchrun inside it."""

    def submit(self, job: Job, work: Path, lock: int) -> Handle:
        """Start it; stdout and stderr go to a file, so that nobody's death can block or break the job."""
        (work / JOB).write_text(job.model_dump_json(indent=1), encoding="utf-8")
        with (work / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_ext.worker", str(work / JOB)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(job),
                start_new_session=True,
                pass_fds=(lock,),
            )
        return LocalProcess(process)


class LocalProcess:
    """One worker process and the ranks that it announced."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def exit_code(self) -> int | None:
        return self._process.poll()

    def stop(self, ranks: list[int]) -> None:
        """SIGTERM to the ranks themselves: torchrun would kill them 30 s after its own SIGTERM."""
        for pid in ranks or [self._process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def kill(self, ranks: list[int]) -> None:
        alive = [self._process.pid] if self._process.poll() is None else []
        for pid in {*ranks, *alive}:
            with suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        self._process.wait()


def _environment(job: Job) -> dict[str, str]:
    environment = dict(os.environ) | {
        OWNERS: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    if job.job == "train":
        cores = len(os.sched_getaffinity(0))
        threads = job.runtime.num_threads or max(1, cores // job.runtime.nproc_per_node)
        environment |= dict.fromkeys(THREADS, str(threads))
    return environment
