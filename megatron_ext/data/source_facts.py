"""Digests and numbers of rows of data files, found in a thread beside the work; whether a file changed meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import xxhash

from megatron_ext.data.sources import Source
from megatron_ext.data.sources.places import open_filesystem
from megatron_ext.errors import MegatronFlowsError, SourceError

CHUNK = 4 << 20
MARKS = ("sha256", "blob_id", "etag", "ETag", "checksum", "md5", "content_md5", "md5Hash", "version_id", "ino")
"""What file systems say of a file that changes with its content."""
TIMES = ("mtime", "last_modified", "LastModified", "modified", "updated", "created")


class SourceFacts:
    """Digest of each file, and how many rows all of them have, where that is cheap to know."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._states = [file_state(source) for source in sources]
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

    def require_unchanged(self) -> None:
        """Refuse files that changed since the start.

        Raises:
            SourceError: names the file.
        """
        for source, state in zip(self._sources, self._states, strict=True):
            if file_state(source) != state:
                raise SourceError(f"{source} changed while it was read; run this again when it is written")

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._thread.join()

    def _find(self) -> None:
        for number, source in enumerate(self._sources):
            try:
                digest = self._local(number, source) if not source.is_url else remote_digest(source)
                self._digests[number].set_result(digest)
            except (MegatronFlowsError, OSError) as error:
                self._digests[number].set_exception(
                    error if isinstance(error, MegatronFlowsError) else SourceError(f"cannot read {source}: {error}")
                )
            if self._stopped:
                return
        self._known.set()

    def _local(self, number: int, source: Source) -> str:
        lines = source.compression is None and source.kind in (".jsonl", ".txt")
        hasher, count, last = xxhash.xxh3_128(), 0, b""
        with open(source.path, "rb", buffering=0) as file:
            while not self._stopped and (chunk := file.read(CHUNK)):
                hasher.update(chunk)
                if lines:
                    count, last = count + chunk.count(b"\n"), chunk[-1:]
        if lines:
            self._rows[number] = count + (last not in (b"", b"\n"))
        elif source.kind == ".parquet" and source.compression is None:
            self._rows[number] = _parquet_rows(source)
        return hasher.hexdigest()


def file_state(source: Source) -> list[int] | None:
    """Size, time of change and inode of a file; None for a URL."""
    if source.is_url:
        return None
    stat = os.stat(source.path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def remote_digest(source: Source) -> str:
    """Digest of what the server says identifies a URL's content.

    Raises:
        SourceError: it says nothing of that kind, or cannot be asked.
    """
    filesystem, path = open_filesystem(source.path)
    try:
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


def _parquet_rows(source: Source) -> int | None:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_metadata(source.path).num_rows
    except (pyarrow.ArrowException, OSError):
        return None  # its reader says what is wrong with it
