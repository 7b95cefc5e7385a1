"""Things that can be made again, kept between runs: plans of data sets, converted tokenizers.

They lie under ``$MFLOW_CACHE``, else ``$XDG_CACHE_HOME/megatron-flows``, else ``~/.cache/megatron-flows``; where that
cannot be written, in a temporary folder that ends with the process. Removing all of it only costs time.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ext.folders import folder_lock, fsync_tree

PLACE = "MFLOW_CACHE"
NAMES = "names.txt"
KEPT = 64
"""Entries of one kind that are kept; the longest unused go first."""


def kept(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder ``KIND/KEY`` of the cache; where it is missing, ``make`` fills it, in one process of all that ask.

    The others wait for a file lock, which the kernel releases should the maker die.
    """
    home = _root() / kind
    place = home / key
    if not place.is_dir():
        lock = home / f".{key}.lock"
        with folder_lock(lock):
            try:
                if not place.is_dir():
                    _make(place, make)
            finally:
                lock.unlink(missing_ok=True)
        _prune(home)
    with suppress(OSError):
        now = time.time_ns()  # finer than the file system's own clock
        os.utime(place, ns=(now, now))
    return place


def kept_arrays(kind: str, key: str, make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Named arrays of the cache, memory-mapped, so that all processes of a machine share their pages."""

    def write(folder: Path) -> None:
        arrays = make()
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        (folder / NAMES).write_text("\n".join(arrays), encoding="utf-8")

    folder = kept(kind, key, write)
    try:
        return _mapped(folder)
    except (OSError, ValueError, EOFError):  # damaged from outside
        shutil.rmtree(folder, ignore_errors=True)
        return _mapped(kept(kind, key, write))


def _mapped(folder: Path) -> dict[str, np.ndarray]:
    names = (folder / NAMES).read_text(encoding="utf-8").split()
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def _make(place: Path, make: Callable[[Path], None]) -> None:
    partial = Path(tempfile.mkdtemp(prefix=".partial.", dir=place.parent))
    try:
        make(partial)
        fsync_tree(partial)
        partial.chmod(0o755)
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _prune(home: Path) -> None:
    """Leave the ``KEPT`` entries used last; what another process has mapped stays readable to it."""
    used: list[tuple[int, Path]] = []
    for path in home.iterdir():
        with suppress(OSError):  # another process may prune, too
            if path.is_dir() and not path.name.startswith("."):
                used.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(used, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _root() -> Path:
    if given := os.environ.get(PLACE):
        return Path(given).absolute()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "megatron-flows"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
    return home if os.access(home, os.W_OK | os.X_OK) else _temporary()


@lru_cache(maxsize=1)
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="megatron-flows-cache."))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
