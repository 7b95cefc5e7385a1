"""What turns text into token ids: ``gigatoken`` where it is exact for this tokenizer and data, else the reference.

The reference is the tokenizer itself (``tokenizers``, or the Python one), at a fiftieth of the speed. What must hold
before the fast engine is believed is in ``engine_proof``.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_ext.data.definition import Definition

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer

    from megatron_ext.data.slow_tokenizer import SlowTokenizer

GIGATOKEN, TOKENIZERS, PYTHON = "gigatoken", "tokenizers", "python"
REFERENCE_BYTES = 1 << 20
"""Text that the reference encodes at once: its results take some hundred bytes a token."""
MEMORY_LIMIT = 560 << 20
"""Resident bytes of the process beyond which the engine's cache of words is emptied."""
SPARE = 64 << 20
"""So far below the limit it must be after free memory was given back, or the cache goes."""
RENEW_AFTER = 16 << 20
"""Bytes of text an engine encodes at least before its cache is emptied."""


@dataclass(frozen=True)
class Texts:
    """UTF-8 texts one after the other.

    Attributes:
        data: (B,) uint8, the bytes of all texts.
        bounds: (N + 1,) int64; text ``i`` is ``data[bounds[i]:bounds[i + 1]]``.
    """

    data: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of_arrow(cls, values: pyarrow.StringArray | pyarrow.LargeStringArray) -> Texts:
        """The values of an Arrow array without nulls; the bytes are shared, not copied."""
        _, offsets, data = values.buffers()
        width = np.dtype(np.int64 if str(values.type) == "large_string" else np.int32)
        bounds = np.frombuffer(offsets, width, len(values) + 1, values.offset * width.itemsize).astype(np.int64)
        return cls(np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), bounds)

    @classmethod
    def of_strings(cls, texts: Iterable[str]) -> Texts:
        """Python's strings.

        Raises:
            UnicodeEncodeError: one holds a lone surrogate.
        """
        encoded = [text.encode() for text in texts]
        bounds = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=bounds[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), bounds)

    @property
    def count(self) -> int:
        """Number of texts."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> np.ndarray:
        """(N,) int64 bytes of each text."""
        return np.diff(self.bounds)

    def bytes(self, number: int) -> bytes:
        """One text in UTF-8."""
        return self.data[self.bounds[number] : self.bounds[number + 1]].tobytes()

    def string(self, number: int) -> str:
        """One text as Python has it."""
        return self.bytes(number).decode()

    def select(self, numbers: Sequence[int] | np.ndarray) -> Texts:
        """The texts of these numbers."""
        return Texts.of_strings(self.string(int(number)) for number in numbers)


class Ids(NamedTuple):
    """Token ids of texts one after the other.

    Attributes:
        values: (T,) uint32 or int32.
        lengths: (N,) int64 tokens of each text; 0 where a text is empty.
        from_reference: how many of the texts the fast engine left to the reference.
    """

    values: np.ndarray
    lengths: np.ndarray
    from_reference: int = 0

    def of(self, number: int) -> np.ndarray:
        """The ids of one text."""
        start = int(self.lengths[:number].sum())
        return self.values[start : start + int(self.lengths[number])]


class ReferenceEngine:
    """The tokenizer itself, or what ``load`` gives when it is first needed; threads may share it."""

    def __init__(
        self,
        tokenizer: Tokenizer | SlowTokenizer | None = None,
        load: Callable[[], Tokenizer | SlowTokenizer] | None = None,
    ) -> None:
        self._tokenizer, self._load, self._lock = tokenizer, load, threading.Lock()

    @property
    def tokenizer(self) -> Tokenizer | SlowTokenizer:
        """It, loaded."""
        with self._lock:
            if self._tokenizer is None:
                assert self._load is not None
                self._tokenizer = self._load()
        return self._tokenizer

    def encode(self, texts: Texts) -> Ids:
        """Ids of the texts, a part at a time."""
        parts: list[np.ndarray] = []
        lengths = np.empty(texts.count, dtype=np.int64)
        for first, last in portions(texts.bounds, REFERENCE_BYTES):
            strings = [texts.string(number) for number in range(first, last)]
            found = [e.ids for e in self.tokenizer.encode_batch_fast(strings, add_special_tokens=False)]
            lengths[first:last] = [len(ids) for ids in found]
            parts.append(np.fromiter(chain.from_iterable(found), dtype=np.int32, count=int(lengths[first:last].sum())))
        return Ids(np.concatenate(parts) if parts else np.empty(0, np.int32), lengths)


class GigatokenEngine:
    """``gigatoken``; threads that share one take turns, and with ``threads`` more than one each turn uses so many.

    It keeps every word it ever saw with its ids. Where the process grows beyond a limit, it starts afresh.
    Texts with characters that ``unsafe`` matches go to the reference.

    Raises:
        ValueError: gigatoken does not take this tokenizer; says why.
    """

    def __init__(self, definition: Definition, reference: ReferenceEngine, threads: int = 1) -> None:
        self.definition, self._reference, self._parallel = definition, reference, threads > 1
        if self._parallel:
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read when the first parallel turn begins
        self._unsafe = unsafe_characters() if "NFC" in definition.normalizers else None
        self._memory = MEMORY_LIMIT
        self._one_by_one, self._turn = True, threading.Lock()
        self._renew()

    def encode(self, texts: Texts) -> Ids:
        """Ids of the texts, which must be valid UTF-8."""
        unsafe = self._unsafe_texts(texts)
        return self._mixed(texts, unsafe) if len(unsafe) else self._encode(texts)

    @cached_property
    def token_bytes(self) -> Texts:
        """The bytes that each id stands for, by id; as in the normalized text (a space may be ``▁``)."""
        vocabulary = self._tokenizer.vocab
        size = max(vocabulary, default=-1) + 1
        tokens = [vocabulary.get(number, b"") for number in range(size)]
        bounds = np.zeros(size + 1, dtype=np.int64)
        np.cumsum([len(token) for token in tokens], out=bounds[1:])
        return Texts(np.frombuffer(b"".join(tokens), np.uint8), bounds)

    def _renew(self) -> None:
        import gigatoken

        try:
            self._tokenizer = gigatoken.Tokenizer.from_json(self.definition.text)
        except Exception as error:  # noqa: BLE001 (gigatoken raises no narrower class)
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        self._encoded = 0

    def _encode(self, texts: Texts) -> Ids:
        with self._turn:
            self._keep_small()
            self._encoded += int(texts.bounds[-1] - texts.bounds[0])
            if self._one_by_one:  # the first texts need not wait for the import of awkward
                self._one_by_one = False
                return self._singly(texts)
            return self._together(texts)

    def _keep_small(self) -> None:
        if self._encoded < RENEW_AFTER or resident() < self._memory:
            return
        give_back()
        self._encoded = 0
        if resident() > self._memory - SPARE:
            del self._tokenizer  # before the new one is made
            give_back()
            self._renew()

    def _singly(self, texts: Texts) -> Ids:
        found = [self._tokenizer.encode(texts.bytes(number)) for number in range(texts.count)]
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        return Ids(np.concatenate(found) if found else np.empty(0, np.uint32), lengths)

    def _together(self, texts: Texts) -> Ids:
        import awkward

        contents: Any = awkward.contents
        characters = contents.NumpyArray(texts.data, parameters={"__array__": "char"})
        strings = contents.ListOffsetArray(
            awkward.index.Index64(texts.bounds), characters, parameters={"__array__": "string"}
        )
        rows: Any = self._tokenizer.encode_batch(awkward.Array(strings), parallel=self._parallel).layout
        bounds = np.asarray(rows.offsets.data)
        return Ids(np.asarray(rows.content.data)[bounds[0] : bounds[-1]], np.diff(bounds))

    def _unsafe_texts(self, texts: Texts) -> np.ndarray:
        """Numbers of the texts that hold an unsafe character; only those beyond ASCII are looked at closely."""
        if self._unsafe is None or not texts.count:
            return np.empty(0, dtype=np.int64)
        data = texts.data[texts.bounds[0] : texts.bounds[-1]]
        if not len(data) or data.max() < 0x80:
            return np.empty(0, dtype=np.int64)
        import pyarrow
        import pyarrow.compute as pc

        buffers = pyarrow.py_buffer(texts.bounds), pyarrow.py_buffer(texts.data)
        strings = pyarrow.LargeStringArray.from_buffers(texts.count, *buffers)
        found = pc.match_substring_regex(strings, self._unsafe)  # pyright: ignore[reportAttributeAccessIssue]
        return found.to_numpy(zero_copy_only=False).nonzero()[0]

    def _mixed(self, texts: Texts, unsafe: np.ndarray) -> Ids:
        """Ids of texts of which some go to the reference."""
        safe = np.setdiff1d(np.arange(texts.count), unsafe)
        fast, slow = self._encode(texts.select(safe)), self._reference.encode(texts.select(unsafe))
        lengths = np.empty(texts.count, dtype=np.int64)
        lengths[safe], lengths[unsafe] = fast.lengths, slow.lengths
        from_reference = np.zeros(texts.count, dtype=bool)
        from_reference[unsafe] = True
        slow_places = np.repeat(from_reference, lengths)
        values = np.empty(int(lengths.sum()), dtype=np.uint32)
        values[~slow_places], values[slow_places] = fast.values, slow.values
        return Ids(values, lengths, len(unsafe))


def resident() -> int:
    """Resident bytes of this process."""
    import psutil

    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Return what is free on the heaps of all threads to the system, which glibc does not do by itself."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def engine_version(name: str) -> str:
    """Version of the package behind an engine."""
    return version({PYTHON: "sentencepiece"}.get(name, name))


def refusal(definition: Definition) -> str | None:
    """Why gigatoken is not even tried on a tokenizer, or None.

    Its model must be BPE without dropout. Its normalizer must leave text alone, replace or prepend fixed characters,
    or be NFC, whose results never change for characters that Unicode 3.2 knows; any other normalizer rests on tables
    that differ between Unicode versions, and so between engines.
    """
    model = definition.model
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"its model is {model.get('type', 'of no named type')}, not BPE"
    if model.get("dropout"):
        return "its model drops merges at random"
    unknown = [kind for kind in definition.normalizers if kind not in ("NFC", "Prepend", "Replace")]
    return f"its normalizer {unknown[0]} changes text by tables that differ between engines" if unknown else None


def unsafe_characters() -> str:
    """A pattern (RE2, and Python's) of the characters on which two correct NFC normalizers may differ.

    Normalized text that every version of Unicode since 3.2 knows stays the same in all later ones. A character that
    is newer matters where it composes, decomposes or is reordered, or may do so because Python does not know it yet.
    Source: Unicode Standard Annex 15, "Stability of Normalized Forms".
    """
    import unicodedata

    from megatron_ext.cache import kept_arrays

    def make() -> dict[str, np.ndarray]:
        return {"ranges": np.array(_unsafe_ranges(), dtype=np.int64)}

    ranges = kept_arrays("unicode", f"nfc-{unicodedata.unidata_version}", make)["ranges"].tolist()
    return "[" + "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges) + "]"


def _unsafe_ranges() -> list[list[int]]:
    import unicodedata

    known = [*range(0xD800), *range(0xF900, 0x40000), *range(0xE0000, 0xE1000)]  # private use is never normalized
    parts: set[str] = set()
    for number in known:
        parts.update(unicodedata.decomposition(chr(number)).split())
    unassigned = "Cn"
    ranges = [[0x40000, 0xDFFFF]]
    for number in known:
        character = chr(number)
        if unicodedata.ucd_3_2_0.category(character) != unassigned:
            continue
        decomposition = unicodedata.decomposition(character)
        changes = unicodedata.combining(character) or (decomposition and decomposition[0] != "<")
        if not (changes or unicodedata.category(character) == unassigned or f"{number:04X}" in parts):
            continue
        if ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def portions(bounds: np.ndarray, size: int) -> Iterable[tuple[int, int]]:
    """Numbers ``[first, last)`` of texts that together have about ``size`` bytes."""
    first, count = 0, len(bounds) - 1
    while first < count:
        last = int(np.searchsorted(bounds, bounds[first] + size, side="left"))
        last = min(max(last, first + 1), count)
        yield first, last
        first = last
