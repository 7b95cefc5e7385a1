"""The machine that is measured: its name, and memory that is as warm for one side as for the other."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
from pathlib import Path


def warm(size: int) -> None:
    """Touch ``size`` bytes of memory and free them: the next pages that anybody takes are those.

    A virtual machine that reports its free pages gives them back to its host, and whoever takes them next waits for
    the host: on the machine of the README's tables up to 12 us a page, several times what copying it takes.
    """
    memory = mmap.mmap(-1, size)
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    memory.close()


def described(place: Path) -> str:
    """One line: processor, cores, memory, the file system of ``place``, and the load before the start."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    mount = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", str(place)], capture_output=True, text=True, check=False)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB memory, "
        f"{mount.stdout.strip() or 'unknown file system'}, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}"
    )
