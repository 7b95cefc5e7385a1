"""Digests and numbers of rows of data files, found in a thread beside the work; whether a file changed meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from megatron_ext.data.sources import Source
from megatron_ext.data.sources.places import open_filesystem
from megatron_ext.data.sources.rows import arrow_batches, line_ends
from megatron_ext.errors import MegatronFlowsError, SourceError

CHUNK = 4 << 20
REQUESTS = 8
"""To servers at once."""
FileState = list[int] | str
MARKS = (
    "sha256", "blob_id", "etag", "ETag", "checksum", "md5", "content_md5", "Content-MD5", "Digest", "md5Hash",
    "version_id", "ino",
)  # fmt: skip
"""What file systems say of a file that changes with its content."""
TIMES = ("mtime", "last_modified", "LastModified", "Last-Modified", "modified", "updated", "created")


class SourceFacts:
    """Digest of each file, and how many rows all of them have, where that is cheap to know."""

    def __init__(self, sources: list[Source], states: list[FileState]) -> None:
        self._sources, self._states = sources, states
        self._digests: list[Future[str]] = [Future() for _ in sources]
        self._rows: list[int | None] = [None] * len(sources)
        self._stopped = False
        self._known = threading.Event()
        self._thread = threading.Thread(target=self._find, name="digests", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int | None:
        """Rows of all files; None while that is not known, or if it never will be."""
        return sum(count or 0 for count in self._rows) if self._known.is_set() and None not in self._rows else None

    def digest(self, number: int) -> str:
        """Digest of one file.

        Raises:
            SourceError: it cannot be read.
        """
        return self._digests[number].result()

    def changed(self) -> list[Source]:
        """Files that are no longer what they were at the start.

        Raises:
            SourceError: one cannot be looked at.
        """
        now = zip(self._sources, self._states, file_states(self._sources), strict=True)
        return [source for source, before, state in now if before != state]

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._thread.join()

    def _find(self) -> None:
        for number, source in enumerate(self._sources):
            try:
                state = self._states[number]
                digest = state if isinstance(state, str) else self._local(number, source)
                self._digests[number].set_result(digest)
            except (MegatronFlowsError, OSError) as error:
                self._digests[number].set_exception(
                    error if isinstance(error, MegatronFlowsError) else SourceError(f"cannot read {source}: {error}")
                )
            if self._stopped:
                return
        self._known.set()

    def _local(self, number: int, source: Source) -> str:
        lines = (
            _Lines(source.kind) if source.compression is None and source.kind in (".jsonl", ".txt", ".csv") else None
        )
        hasher = xxhash.xxh3_128()
        with open(source.path, "rb", buffering=0) as file:
            while not self._stopped and (chunk := file.read(CHUNK)):
                hasher.update(chunk)
                if lines is not None:
                    lines.take(chunk)
        if lines is not None:
            self._rows[number] = lines.rows
        elif source.kind == ".parquet" and source.compression is None:
            self._rows[number] = _columnar_rows(_parquet_rows, source)
        elif source.kind == ".arrow" and source.compression is None:
            self._rows[number] = _columnar_rows(_arrow_rows, source)
        return hasher.hexdigest()


def file_states(sources: Sequence[Source]) -> list[FileState]:
    """What tells whether each file is still the same: size, time of change and inode, or a URL's ``remote_digest``.

    Raises:
        SourceError: a file is gone, or as ``remote_digest``.
    """
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(_file_state, sources))


def _file_state(source: Source) -> FileState:
    if source.is_url:
        return remote_digest(source)
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise SourceError(f"cannot look at data file {source}: {error.strerror}; check the path") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def remote_digest(source: Source) -> str:
    """Digest of what the server says identifies a URL's content.

    Raises:
        SourceError: it says nothing of that kind, or cannot be asked.
    """
    filesystem, path = open_filesystem(source.path)
    try:
        filesystem.invalidate_cache(path)  # or a listing of long ago may answer
        info = filesystem.info(path)
    except FileNotFoundError:
        raise SourceError(f"data file {source} does not exist; check the URL") from None
    except Exception as error:  # noqa: BLE001 (every backend has exceptions of its own)
        why = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot look at {source}: {why}; check the URL and your credentials") from None
    said = _marks(info)
    if not said:
        raise SourceError(
            f"{source}: its server names neither a checksum nor an ETag nor a time of change, so that nobody can tell "
            "whether the file is still the same; download it and name the local file"
        )
    return xxhash.xxh3_128_hexdigest(repr((source.name, info.get("size"), said)).encode())


def _marks(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Marks of the content, else the time of change."""
    for names in (MARKS, TIMES):
        if found := [(name, str(info[name])) for name in names if info.get(name) not in (None, "")]:
            return found
    return []


class _Lines:
    """Counts lines; of csv the records, for which line breaks in quotes are none, without the header."""

    def __init__(self, kind: str) -> None:
        self._csv, self._count, self._last, self._quoted = kind == ".csv", 0, b"", False

    def take(self, chunk: bytes) -> None:
        self._last = chunk[-1:]
        if not self._csv or (not self._quoted and b'"' not in chunk):
            self._count += line_ends(chunk)
            return
        values = np.frombuffer(chunk, dtype=np.uint8)
        quotes = np.flatnonzero(values == ord('"'))
        before = np.searchsorted(quotes, np.flatnonzero(values == ord("\n"))) + self._quoted
        self._count += int((before % 2 == 0).sum())
        self._quoted = bool((len(quotes) + self._quoted) % 2)

    @property
    def rows(self) -> int:
        """Rows of the file, when all of it was taken."""
        return max(0, self._count + (self._last not in (b"", b"\n")) - self._csv)


def _columnar_rows(count: Callable[[Source], int], source: Source) -> int | None:
    import pyarrow

    try:
        return count(source)
    except (pyarrow.ArrowException, OSError):
        return None  # its reader says what is wrong with it


def _parquet_rows(source: Source) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(source.path).num_rows


def _arrow_rows(source: Source) -> int:
    import pyarrow

    with pyarrow.memory_map(source.path) as mapped:
        return sum(map(len, arrow_batches(mapped, ())))
