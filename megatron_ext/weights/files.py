"""Files of known size whose bytes come in any order and from several threads; files read the same way."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import torch

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class PlacedFile:
    """A new file of ``size`` bytes, its room on the disk taken at once; bytes that nobody puts are zero.

    Raises:
        OSError: the disk has no room for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        self._pending = False
        _reserve(self._descriptor, size)

    def put(self, offset: int, content: bytes | torch.Tensor) -> None:
        """Write bytes, or a tensor's elements in their order, at ``offset``; any number of threads may."""
        view = memoryview(bytes_of(content) if isinstance(content, torch.Tensor) else content)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written
        with self._lock:
            self._pending = True

    def sync(self) -> None:
        """Wait until what was put before this call is on the disk; others may go on putting."""
        with self._lock:
            pending, self._pending = self._pending, False
        if pending:
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """End the file; no thread may be putting."""
        self._closed()


class OpenFile:
    """A file that any number of threads read at offsets.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._closed = weakref.finalize(self, os.close, self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def fill(self, offset: int, out: torch.Tensor) -> None:
        """Read the elements of ``out``, which is contiguous, from ``offset`` on.

        Raises:
            EOFError: the file ends before.
        """
        view = memoryview(bytes_of(out))
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise EOFError(f"it ends at byte {offset}")
            view, offset = view[count:], offset + count

    def bytes(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on, or fewer at the file's end."""
        return os.pread(self._descriptor, length, offset)

    def section(self, offset: int, length: int) -> BinaryIO:
        """``length`` bytes from ``offset`` on, as a file of their own."""
        return io.BufferedReader(_Section(self._descriptor, offset, length))

    def close(self) -> None:
        """End reading; no thread may be reading."""
        self._closed()


class _Section(io.RawIOBase):
    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._offset, self._length, self._place = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._place)]
        count = os.preadv(self._descriptor, [view], self._offset + self._place)
        self._place += count
        return count


def bytes_of(tensor: torch.Tensor) -> Any:
    """The tensor's elements in their order as a buffer; its own memory where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


_memcmp = ctypes.CDLL(None).memcmp  # 8 GB/s a thread where torch.equal has 5, and NaNs equal themselves
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape have the same bytes: a NaN equals itself, -0.0 does not equal 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = left.contiguous(), right.contiguous()
    return _memcmp(left.data_ptr(), right.data_ptr(), left.nbytes) == 0


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
