"""A dataset while it is being built: files that only grow, and a journal of the shards that are whole.

A shard is a stretch of rows of one file. Its tokens are appended to the ``.bin`` files, its lengths to ``.lengths``,
then its line to the journal. A killed build goes on behind the last line whose bytes are what the line says (a digest
each), so no shard is made twice and none is half there. Where the stretches end has no influence on the result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatron_ext.data.counts import Counts
from megatron_ext.data.documents import Batch
from megatron_ext.data.idxmap import write_index
from megatron_ext.data.manifest import LOSS_MASK, SIDES, TOKENS
from megatron_ext.errors import VocabularyError

JOURNAL = "shards.jsonl"
PART = 8 << 20
COUNTED_AT_ONCE = 1 << 20
"""Token ids."""


@dataclass
class Stream:
    """One file that grows: the values of an idxmap, or the lengths of its documents."""

    path: Path
    dtype: np.dtype
    file: BinaryIO | None = None
    size: int = 0
    hasher: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def write(self, values: np.ndarray) -> None:
        """Append values of any type that fit ``dtype``."""
        data = np.ascontiguousarray(values, dtype=self.dtype).view(np.uint8).data
        self.hasher.update(data)
        self.file.write(data)  # type: ignore[union-attr]
        self.size += len(data)


class Shards:
    """The files of one build in folder ``out``.

    Args:
        out: the folder; it may hold what a killed attempt left.
        identity: what decides the result; the leftovers of another identity are cleared.
        start: what was decided at the start and must stay (engine, moment); leftovers of another are cleared, too.
        kind: of the dataset.
        dtype: type of token ids on disk.
        vocabulary: number of ids; a larger id is an error.
        skipping: whether rows may be skipped; if not, leftovers in which some were are of no use.
    """

    def __init__(
        self,
        out: Path,
        identity: str,
        start: dict[str, str],
        kind: str,
        dtype: np.dtype,
        vocabulary: int,
        *,
        skipping: bool,
    ) -> None:
        self.out, self.kind, self.dtype, self._skipping = out, kind, dtype, skipping
        self._head = {"identity": identity, "start": start}
        self.frequencies = np.zeros(vocabulary, dtype=np.int64)
        self.total = Counts()
        self.by_source: dict[int, Counts] = {}
        self.position: tuple[int, int] = (0, 0)
        """Source and row behind which the build goes on."""
        self._streams: dict[str, Stream] = {}
        for side in SIDES[kind]:
            self._streams[f"{side}{TOKENS}.bin"] = Stream(out / f"{side}{TOKENS}.bin", dtype.newbyteorder("<"))
            if kind != "text":
                self._streams[f"{side}{LOSS_MASK}.bin"] = Stream(out / f"{side}{LOSS_MASK}.bin", np.dtype(np.uint8))
            self._streams[f"{side}lengths"] = Stream(out / f".{side}lengths", np.dtype("<i4"))
        self._shard = Counts()
        self._uncounted, self._held = np.empty(COUNTED_AT_ONCE, dtype=np.intp), 0
        self._journal: BinaryIO | None = None

    @property
    def rows(self) -> int:
        """Rows that were read, those of the shard being made included."""
        return self.total.rows + self._shard.rows

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self.total.tokens + self._shard.tokens

    def __enter__(self) -> Shards:
        self.out.mkdir(parents=True, exist_ok=True)
        lines = self._kept_lines()
        for stream in self._streams.values():
            stream.file = stream.path.open("r+b" if lines else "wb")
            stream.file.truncate(stream.size)
            stream.file.seek(stream.size)
        draft = self.out / f".{JOURNAL}"
        draft.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in [self._head, *lines]))
        draft.replace(self.out / JOURNAL)
        self._journal = (self.out / JOURNAL).open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._journal, *(stream.file for stream in self._streams.values())):
            if file is not None:
                file.close()

    def add(self, sides: Sequence[Batch], counts: Counts) -> None:
        """Append documents to the shard that is being made.

        Args:
            sides: (one for each side) the same documents; empty if there are none.
            counts: of these rows; tokens and documents are counted here.

        Raises:
            VocabularyError: an id is beyond the vocabulary.
        """
        if not sides or not len(sides[0].lengths):
            self._shard.add(counts)
            return
        for number, (prefix, side) in enumerate(zip(SIDES[self.kind], sides, strict=True)):
            self._count_ids(side.ids)
            self._streams[f"{prefix}{TOKENS}.bin"].write(side.ids)
            self._streams[f"{prefix}lengths"].write(side.lengths)
            counts.tokens += len(side.ids)
            if side.mask is not None:
                self._streams[f"{prefix}{LOSS_MASK}.bin"].write(side.mask)
                trained = np.add.reduceat(side.mask, side.starts, dtype=np.int64)
                counts.trained[number] += int(trained.sum())
                counts.untrained[number] += int((trained == 0).sum())
        counts.documents += len(sides[0].lengths)
        self._shard.add(counts)

    def finish_shard(self, source: int, row: int) -> None:
        """Write the journal's line of the shard that ends with ``row`` of a source."""
        assert self._journal is not None
        self._count()
        for stream in self._streams.values():
            stream.file.flush()  # type: ignore[union-attr]
        line = {
            "source": source,
            "row": row,
            "sizes": {name: stream.size for name, stream in self._streams.items()},
            "digests": {name: stream.hasher.hexdigest() for name, stream in self._streams.items()},
            "counts": asdict(self._shard),
        }
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._count_shard(source, row, self._shard)
        self._shard = Counts()
        for stream in self._streams.values():
            stream.hasher = xxhash.xxh3_128()

    def lengths(self, side: str) -> Iterator[np.ndarray]:
        """The lengths of one side's documents, in parts."""
        held = self._mapped_lengths(side)
        for start in range(0, len(held), PART):
            yield held[start : start + PART]

    def finish(self) -> None:
        """Write the indices; ``clear`` what only the building needed when all else is written."""
        for side in SIDES[self.kind]:
            lengths = self._mapped_lengths(side)
            write_index(self.out / f"{side}{TOKENS}", self.dtype, lengths)
            if self.kind != "text":
                write_index(self.out / f"{side}{LOSS_MASK}", np.uint8, lengths)
        self.__exit__()

    def discard(self) -> None:
        """Forget all shards: what they hold is of no use to another attempt."""
        clear(self.out)
        self.total = Counts()

    def _mapped_lengths(self, side: str) -> np.ndarray:
        stream = self._streams[f"{side}lengths"]
        stream.file.flush()  # type: ignore[union-attr]
        return np.memmap(stream.path, stream.dtype, "r") if stream.size else np.empty(0, stream.dtype)

    def _count_ids(self, ids: np.ndarray) -> None:
        """Count them, many at once: a table of the vocabulary's size is filled each time."""
        if (largest := int(ids.max(initial=0))) >= len(self.frequencies):
            raise VocabularyError(f"token id {largest} is beyond the vocabulary of {len(self.frequencies)}")
        for part in np.split(ids, range(COUNTED_AT_ONCE, len(ids), COUNTED_AT_ONCE)):
            if self._held + len(part) > COUNTED_AT_ONCE:
                self._count()
            self._uncounted[self._held : self._held + len(part)] = part
            self._held += len(part)

    def _count(self) -> None:
        counts = np.bincount(self._uncounted[: self._held])
        self.frequencies[: len(counts)] += counts
        self._held = 0

    def _count_shard(self, source: int, row: int, counts: Counts) -> None:
        self.total.add(counts)
        self.by_source.setdefault(source, Counts()).add(counts)
        self.position = source, row

    # --- what a killed attempt left ---------------------------------------------------------------------------

    def _kept_lines(self) -> list[dict]:
        """The journal's lines that hold, after taking them over; the first that does not ends it."""
        kept: list[dict] = []
        with suppress(OSError, ValueError):  # a line that the kill cut in two
            for number, text in enumerate((self.out / JOURNAL).read_bytes().splitlines()):
                line = json.loads(text)
                if number == 0 and line == self._head:
                    continue
                if number == 0 or not self._holds(line):
                    break
                kept.append(line)
        if not kept:
            clear(self.out)
        return kept

    def _holds(self, line: dict) -> bool:
        """Whether the bytes of a shard are there and may be used; if so they count as written."""
        if line["counts"]["skipped"] and not self._skipping:
            return False
        frequencies = np.zeros_like(self.frequencies)
        for name, stream in self._streams.items():
            end = line["sizes"][name]
            try:
                with stream.path.open("rb") as file:
                    file.seek(stream.size)
                    hasher = xxhash.xxh3_128()
                    for part in _parts(file, end - stream.size):
                        hasher.update(part)
                        if name.endswith(f"{TOKENS}.bin"):
                            counts = np.bincount(np.frombuffer(part, stream.dtype))[: len(frequencies)]
                            frequencies[: len(counts)] += counts
            except OSError:
                return False
            if hasher.hexdigest() != line["digests"][name]:
                return False
        for name, stream in self._streams.items():
            stream.size = line["sizes"][name]
        self.frequencies += frequencies
        self._count_shard(line["source"], line["row"], Counts(**line["counts"]))
        return True


def left_start(out: Path, identity: str) -> dict[str, str] | None:
    """What a killed attempt of this identity decided at its start."""
    with suppress(OSError, ValueError), (out / JOURNAL).open("rb") as file:
        head = json.loads(file.readline())
        if head["identity"] == identity:
            return head["start"]
    return None


def clear(out: Path, *, keep_result: bool = False) -> None:
    """Remove what a build left in ``out``: journal and lengths, and unless it is whole the idxmaps, too."""
    held = [JOURNAL, f".{JOURNAL}", *(f".{side}lengths" for sides in SIDES.values() for side in sides)]
    if not keep_result:
        prefixes = [f"{side}{name}" for sides in SIDES.values() for side in sides for name in (TOKENS, LOSS_MASK)]
        held += [f"{prefix}{suffix}" for prefix in prefixes for suffix in (".bin", ".idx")]
    for name in held:
        (out / name).unlink(missing_ok=True)


def _parts(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (part := file.read(min(size, PART))):
        size -= len(part)
        yield part
