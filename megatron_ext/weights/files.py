"""Files of known size whose bytes come in any order and from several threads; files read the same way."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Any

import torch

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class PlacedFile:
    """A new file of ``size`` bytes, its room on the disk taken at once; bytes that nobody puts are zero.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._file = path.open("wb", buffering=0)
        self._lock = threading.Lock()
        self._pending = 0
        _reserve(self._file.fileno(), size)

    def put(self, offset: int, content: bytes | torch.Tensor) -> None:
        """Write bytes, or a tensor's elements in their order, at ``offset``; any number of threads may."""
        view = memoryview(_bytes_of(content) if isinstance(content, torch.Tensor) else content)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written
        with self._lock:
            self._pending += 1

    def sync(self) -> None:
        """Wait until what was put before this call is on the disk; others may go on putting."""
        with self._lock:
            pending, self._pending = self._pending, 0
        if pending:
            os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """End the file; no thread may be putting."""
        self._file.close()


def read_at(descriptor: int, offset: int, out: torch.Tensor) -> bool:
    """Fill ``out``, which is contiguous, from ``offset`` of an open file; False if the file ends before."""
    view = memoryview(_bytes_of(out))
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _reserve(descriptor: int, size: int) -> None:
    """Take the room; where the file system cannot, only set the size (glibc's posix_fallocate would write it all)."""
    os.ftruncate(descriptor, size)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if size == 0 or fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while fallocate(descriptor, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in UNSUPPORTED:
            return
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
