"""Folders that are published whole: digests, fsync, free space, and ``--out``. Torch-free.

A result is built in a partial folder of a fixed name beside its place, so a killed attempt can be resumed or
cleared, and it appears under its own name by one rename. A reader never sees half of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import xxhash

from megatron_ext.errors import ConfigError, DiskSpaceError, OutputExistsError, UserError

CHUNK = 8 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20}
UNITS |= {"GIB": 1 << 30, "TIB": 1 << 40}


def size_in_bytes(text: str, name: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number; ``name`` is the option, for the message.

    Raises:
        ConfigError: it is no size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match and match[2].upper() in UNITS and (size := int(float(match[1]) * UNITS[match[2].upper()])) > 0:
        return size
    raise ConfigError(f"{name} {text!r} is no size; write for instance 5GB, 500MB, 2GiB or a number of bytes")


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
            f"{purpose} needs {_size(needed)}, but {existing} has {_size(free)} free; "
            "free some space or choose another disk"
        )


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Say plainly when the disk filled up while ``folder`` was written, although there seemed to be room before.

    Raises:
        DiskSpaceError: the disk, the quota or the file size limit is exhausted.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides the one behind the other
        cause: BaseException | None = error
        while cause is not None and getattr(cause, "errno", None) not in NO_ROOM:
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError):
            raise
        reason = f"cannot go on writing {folder}: {cause.strerror}; free some space or choose another disk"
        raise DiskSpaceError(reason) from None


@contextmanager
def folder_lock(path: Path, waiting: Callable[[str], None] = lambda holder: None) -> Iterator[int]:
    """Exclusive ``flock`` on ``path``; the kernel releases it when the last holder of the descriptor dies.

    ``waiting`` is told who holds it, if anyone does: ``process 1234``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            waiting(f"process {number}" if number.isdigit() else "another process")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(descriptor)  # the holder before us removed the file: lock the new one
    with suppress(OSError):  # a full disk
        os.pwrite(descriptor, f"{os.getpid():<20}".encode(), 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def published(
    out: Path, *, overwrite: bool = False, marker: str, inputs: Iterable[Path] = (), resumable: bool = False
) -> Iterator[Path]:
    """Build ``--out``: yields the partial folder, then fsyncs and renames it to ``out``.

    ``marker`` names the command (``"convert"``); its partial is ``.NAME.MARKER.partial`` beside ``out`` and is
    yielded as a killed attempt left it. Faulty input leaves nothing behind; a crash leaves the partial, and so does
    any error of a ``resumable`` command that left something in it. What ``overwrite`` was replacing when it was killed
    is put back, or cleared, by the next command on ``out``.
    ``inputs`` are what the command reads: ``overwrite`` must not remove them.

    Raises:
        OutputExistsError: ``out`` holds something and ``overwrite`` was not given, it holds an input, or it lies where
            this user may not write.
    """
    out = out.absolute()
    if not _replaced(out).exists():
        _require_free(out, overwrite)  # at once, without waiting for another process
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise OutputExistsError(f"--out {out} holds the input {path}, which would be lost; choose another folder")
    partial = out.parent / f".{out.name}.{marker}.partial"
    lock = out.parent / f".{out.name}.lock"

    def tell(holder: str) -> None:
        sys.stderr.write(f"waiting for {holder}, which writes {out}\n")

    with _writable(out, folder_lock(lock, tell)):
        try:
            recover_folder(out)
            _require_free(out, overwrite)  # another process may have published it meanwhile
            partial.mkdir(exist_ok=True)
            with full_disk_named(out):
                yield partial
            fsync_tree(partial)
            replace_folder(partial, out)
        except UserError:
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.rmdir()
            raise
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _writable(out: Path, lock: AbstractContextManager[int]) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except OSError as error:
            if error.errno not in NOT_OURS:
                raise
            raise OutputExistsError(f"cannot write --out {out}: {error.strerror}; choose another folder") from None
        yield


def _require_free(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"--out {out} is a file; choose a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputExistsError(f"--out {out} is not empty; choose another folder or pass --overwrite")


def replace_folder(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``; what ``target`` held before is removed after the new one stands.

    A kill on the way leaves it as ``.NAME.replaced``, for ``recover_folder``. One process at a time.
    """
    recover_folder(target)
    old = _replaced(target)
    if target.exists():
        target.rename(old)
    source.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    _remove(old)


def recover_folder(target: Path) -> None:
    """Put back what a killed ``replace_folder`` took away from ``target``; clear it where the new one stands."""
    old = _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)
    _remove(old)


def _replaced(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


@contextmanager
def emptied_on_failure(folder: Path) -> Iterator[None]:
    """Start with an empty ``folder`` (a killed attempt may have left something) and leave none of it on an error."""
    _empty(folder)
    try:
        with full_disk_named(folder):
            yield
    except BaseException:
        _empty(folder)
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
