"""Folders that are published whole: digests, fsync, free space, and ``--out``. Torch-free.

A result is built in a partial folder of a fixed name beside its place, so a killed attempt can be resumed or
cleared, and it appears under its own name by one rename. A reader never sees half of it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megatron_ext.errors import DiskSpaceError, OutputExistsError, UserError

CHUNK = 8 << 20


def digest_file(path: Path) -> str:
    """xxh3-128 of the file's bytes, as hex. Fast (memory bandwidth), against damage, not against attackers."""
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(CHUNK):
            hasher.update(block)
    return hasher.hexdigest()


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, itself included, to the disk."""
    for place, _, names in os.walk(folder):
        for name in [*names, "."]:
            path = os.path.join(place, name)
            if os.path.islink(path):
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Refuse before the first byte if the disk that holds ``folder`` has less than ``needed`` bytes free.

    Raises:
        DiskSpaceError: names what is needed, what is free, and where.
    """
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskSpaceError(
            f"{purpose} needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; "
            "free some space or choose another disk"
        )


@contextmanager
def folder_lock(path: Path) -> Iterator[int]:
    """Exclusive ``flock`` on ``path``; the kernel releases it when the last holder of the descriptor dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # the holder before us removed the file: lock the new one
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def published(out: Path, *, overwrite: bool = False, marker: str) -> Iterator[Path]:
    """Build ``--out``: yields the partial folder, then fsyncs and renames it to ``out``.

    ``marker`` names the command (``"convert"``); its partial is ``.NAME.MARKER.partial`` beside ``out`` and is
    yielded as a killed attempt left it. Faulty input leaves nothing behind; a crash leaves the partial.

    Raises:
        OutputExistsError: ``out`` holds something and ``overwrite`` was not given.
    """
    out = out.absolute()
    _require_free(out, overwrite)
    partial = out.parent / f".{out.name}.{marker}.partial"
    lock = out.parent / f".{out.name}.{marker}.lock"
    with folder_lock(lock):
        try:
            _require_free(out, overwrite)  # another process may have published it meanwhile
            partial.mkdir(exist_ok=True)
            yield partial
            fsync_tree(partial)
            replace_folder(partial, out)
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)


def _require_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"--out {out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputExistsError(f"--out {out} is not empty; choose another folder or pass --overwrite")


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what ``target`` held before is removed after the new one stands."""
    old = None
    if target.exists():
        old = target.parent / f".{target.name}.replaced.{os.getpid()}"
        target.rename(old)
    source.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if old is not None:
        shutil.rmtree(old)
