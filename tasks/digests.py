"""Digests of files: of the user's sources, memoised on disk, and of artifacts, checked again in every process."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import xxhash

from megatron_ext.config import Section
from megatron_ext.folders import digest_file

SMALL = 64 << 20
"""Files up to this many bytes are always compared whole."""
BLOCK, BLOCKS = 64 << 10, 64
MEMO = ".digests.sqlite"

_seen: dict[tuple[str, int, int, int, bool], str] = {}


class Checksum(Section):
    """Size and xxh3-128 of a file, and for a large one also of blocks spread over it."""

    size: int
    digest: str
    sampled: str | None = None


def checksum(path: Path) -> Checksum:
    """The file's checksum, read whole."""
    size = path.stat().st_size
    return Checksum(size=size, digest=_digest(path, False), sampled=_digest(path, True) if size > SMALL else None)


def same_content(path: Path, recorded: Checksum, *, full: bool = False) -> bool:
    """Whether the file still is what ``recorded`` says; without ``full`` a large one is only sampled.

    Raises:
        OSError: it cannot be read.
    """
    if path.stat().st_size != recorded.size:
        return False
    if full:
        return digest_file(path) == recorded.digest
    if recorded.sampled is not None:
        return _digest(path, True) == recorded.sampled
    return _digest(path, False) == recorded.digest


def _digest(path: Path, sampled: bool) -> str:
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, sampled)
    if key not in _seen:
        _seen[key] = _sampled(path, stat.st_size) if sampled else digest_file(path)
    return _seen[key]


def _sampled(path: Path, size: int) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            hasher.update(file.read(BLOCK))
    return hasher.hexdigest()


class SourceDigests:
    """Digests of the user's files, remembered by path, size, mtime and inode; not where nothing can be written."""

    def __init__(self, root: Path) -> None:
        self._path = root / MEMO

    def digest(self, path: Path) -> str:
        """xxh3-128 of the file, read only when it is new or has changed."""
        stat = path.stat()
        key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        with suppress(OSError, sqlite3.Error):
            if known := self._recall(key):
                return known
        found = digest_file(path)
        with suppress(OSError, sqlite3.Error):
            self._remember(key, found)
        return found

    def _recall(self, key: tuple[str, int, int, int]) -> str | None:
        if not self._path.exists():
            return None
        with closing(sqlite3.connect(self._path, timeout=60)) as memo:
            row = memo.execute(
                "select digest from digests where path=? and size=? and mtime_ns=? and inode=?", key
            ).fetchone()
        return row[0] if row else None

    def _remember(self, key: tuple[str, int, int, int], digest: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=60)) as memo, memo:
            memo.execute("create table if not exists digests (path, size, mtime_ns, inode, digest, primary key (path))")
            memo.execute("insert or replace into digests values (?, ?, ?, ?, ?)", (*key, digest))
