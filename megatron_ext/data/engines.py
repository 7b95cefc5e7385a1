"""What turns text into token ids: ``gigatoken`` where it is exact for this tokenizer and data, else the reference.

The reference is the tokenizer itself (``tokenizers``, or the Python one), at a fiftieth of the speed. What must hold
before the fast engine is believed is in ``engine_proof``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer

    from megatron_ext.data.slow_tokenizer import SlowTokenizer

GIGATOKEN, TOKENIZERS, PYTHON = "gigatoken", "tokenizers", "python"
REFERENCE_BYTES = 1 << 20
"""Text that the reference encodes at once: its results take some hundred bytes a token."""
MEMORY_LIMIT, MEMORY_PER_ENGINE = 400 << 20, 80 << 20
"""Resident bytes of the process beyond which an engine's cache of words is emptied: the first part, and for each."""
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

    def string(self, number: int) -> str:
        """One text as Python has it."""
        return self.data[self.bounds[number] : self.bounds[number + 1]].tobytes().decode()

    def select(self, numbers: Sequence[int] | np.ndarray) -> Texts:
        """The texts of these numbers."""
        return Texts.of_strings(self.string(int(number)) for number in numbers)


class Ids(NamedTuple):
    """Token ids of texts one after the other.

    Attributes:
        values: (T,) uint32 or int32.
        lengths: (N,) int64 tokens of each text; 0 where a text is empty.
    """

    values: np.ndarray
    lengths: np.ndarray

    def of(self, number: int) -> np.ndarray:
        """The ids of one text."""
        start = int(self.lengths[:number].sum())
        return self.values[start : start + int(self.lengths[number])]


class Engine(Protocol):
    """Encodes texts without adding special tokens."""

    name: str

    def encode(self, texts: Texts) -> Ids: ...


class ReferenceEngine:
    """The tokenizer itself."""

    reference_documents = 0
    """Documents of another engine that were left to this one."""

    def __init__(self, tokenizer: Tokenizer | SlowTokenizer) -> None:
        self.tokenizer = tokenizer
        self.name = TOKENIZERS if type(tokenizer).__module__.startswith("tokenizers") else PYTHON

    @cached_property
    def definition(self) -> str:
        """The text of tokenizer.json as ``tokenizers`` understood it; a Python tokenizer has none."""
        return self.tokenizer.to_str()  # type: ignore[union-attr]

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
    """``gigatoken``, on the calling thread; one instance is used by one thread at a time.

    It keeps every word it ever saw with its ids. Where the process grows beyond ``memory`` bytes, it starts afresh.
    Texts with characters that ``unsafe`` matches go to the reference.

    Raises:
        ValueError: gigatoken does not take this tokenizer; says why.
    """

    name = GIGATOKEN

    def __init__(self, definition: str, reference: ReferenceEngine, engines: int = 1) -> None:
        self._definition, self._reference = definition, reference
        self._memory = MEMORY_LIMIT + engines * MEMORY_PER_ENGINE
        self._unsafe = unsafe_characters() if normalizes(definition) else None
        self.reference_documents = 0
        self._renew()

    def encode(self, texts: Texts) -> Ids:
        """Ids of the texts, which must be valid UTF-8."""
        unsafe = self._unsafe_texts(texts)
        if not len(unsafe):
            return self._encode(texts)
        self.reference_documents += len(unsafe)
        return self._mixed(texts, unsafe)

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
            self._tokenizer = gigatoken.Tokenizer.from_json(self._definition)
        except Exception as error:  # noqa: BLE001 (gigatoken raises no narrower class)
            raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
        self._encoded = 0

    def _encode(self, texts: Texts) -> Ids:
        import awkward
        import psutil

        if self._encoded > RENEW_AFTER and psutil.Process().memory_info().rss > self._memory:
            del self._tokenizer  # before the new one is made
            self._renew()
        self._encoded += int(texts.bounds[-1] - texts.bounds[0])
        contents: Any = awkward.contents
        characters = contents.NumpyArray(texts.data, parameters={"__array__": "char"})
        strings = contents.ListOffsetArray(
            awkward.index.Index64(texts.bounds), characters, parameters={"__array__": "string"}
        )
        rows: Any = self._tokenizer.encode_batch(awkward.Array(strings), parallel=False).layout
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
        return Ids(values, lengths)


def engine_version(name: str) -> str:
    """Version of the package behind an engine."""
    return version({PYTHON: "sentencepiece"}.get(name, name))


def refusal(definition: str) -> str | None:
    """Why gigatoken is not even tried on a tokenizer (the text of its tokenizer.json), or None.

    Its model must be BPE without dropout. Its normalizer must leave text alone, replace or prepend fixed characters,
    or be NFC, whose results never change for characters that Unicode 3.2 knows; any other normalizer rests on tables
    that differ between Unicode versions, and so between engines.
    """
    facts = parsed(definition)
    model = facts.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"its model is {model.get('type', 'of no named type')}, not BPE"
    if model.get("dropout"):
        return "its model drops merges at random"
    unknown = [kind for kind in _normalizers(facts.get("normalizer")) if kind not in ("NFC", "Prepend", "Replace")]
    return f"its normalizer {unknown[0]} changes text by tables that differ between engines" if unknown else None


def normalizes(definition: str) -> bool:
    """Whether the tokenizer composes characters (NFC)."""
    return "NFC" in _normalizers(parsed(definition).get("normalizer"))


@lru_cache(maxsize=1)
def parsed(definition: str) -> dict[str, Any]:
    """What a tokenizer.json holds; the last one is kept."""
    return json.loads(definition)


def _normalizers(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [kind for part in normalizer["normalizers"] for kind in _normalizers(part)]
    if normalizer["type"] == "Replace" and "String" not in normalizer["pattern"]:
        return ["Replace by a pattern"]
    return [normalizer["type"]]


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
