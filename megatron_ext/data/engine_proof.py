"""Proof that the fast engine gives the reference's ids on this tokenizer and on this data; what fails it is not used.

Two parts. A stress set, which depends on the tokenizer alone, so its outcome is cached: every character of Unicode
between letters, digits, blanks and itself (of long uniform blocks a few), every token of the vocabulary, every added
token among neighbours, blanks and line ends in every mixture, digits, contractions, random strings, very long words.
And a sample of the data itself, in every shard: ``Comparison`` encodes these documents with both. One difference
anywhere, and the reference does all of the work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from megatron_ext.cache import kept
from megatron_ext.data.definition import Definition
from megatron_ext.data.engines import GigatokenEngine, Ids, ReferenceEngine, Texts, engine_version, refusal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VERSION = 1
"""Of the stress set; a new one proves every tokenizer anew."""
COMPARED_TEXTS = 2048
FIRST_BYTES = 1 << 17
"""Documents at the start of the data that are all compared, up to this much text."""
ONE_IN = 1024
"""One document in so many is compared, all over the data."""
UNIFORM = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0x17000, 0x18CFF))
"""Blocks of characters of one kind: ideographs, syllables, private use."""
STEP = 61


class EngineDiffersError(Exception):
    """The fast engine gave other ids than the reference; ``args[0]`` says where."""


@dataclass(frozen=True)
class Proof:
    """Outcome of the stress set: ``why`` is empty where engine and reference agree on all ``texts``."""

    texts: int
    why: str = ""


def prove(definition: Definition, reference: ReferenceEngine) -> Proof:
    """Whether gigatoken may be used for a tokenizer; cached by its definition and the versions of both engines."""
    if reason := refusal(definition):
        return Proof(0, reason)
    try:
        versions = "-".join(engine_version(name) for name in ("gigatoken", "tokenizers"))
    except ImportError:
        return Proof(0, "gigatoken is not installed")
    key = f"{xxhash.xxh3_128_hexdigest(definition.text)}-{versions}-{VERSION}"

    def make(folder: Path) -> None:
        proof = _prove(definition, reference)
        (folder / "proof.json").write_text(json.dumps({"texts": proof.texts, "why": proof.why}), encoding="utf-8")

    return Proof(**json.loads((kept("engines", key, make) / "proof.json").read_text(encoding="utf-8")))


def _prove(definition: Definition, reference: ReferenceEngine) -> Proof:
    tokenizer: Any = reference.tokenizer
    try:
        engine = GigatokenEngine(definition, reference)
    except (ValueError, ImportError) as error:
        return Proof(0, f"gigatoken does not take this tokenizer: {error}")
    count, stress = 0, stress_texts(tokenizer)
    while chosen := list(islice(stress, COMPARED_TEXTS)):
        count += len(chosen)
        texts = Texts.of_strings(chosen)
        found, expected = engine.encode(texts), reference.encode(texts)
        if (number := first_difference(found, expected)) is not None:
            return Proof(count, f"gigatoken differs from tokenizers on {chosen[number][:80]!r}")
    return Proof(count)


def first_difference(found: Ids, expected: Ids) -> int | None:
    """Number of the first text with other ids, or None."""
    if np.array_equal(found.lengths, expected.lengths) and np.array_equal(found.values, expected.values):
        return None
    for number in range(len(expected.lengths)):
        if not np.array_equal(found.of(number), expected.of(number)):
            return number
    return None


@dataclass(frozen=True)
class Comparison:
    """Documents of the data that the reference encodes, too: those at its start, then one in ``ONE_IN`` by row number.

    Which ones depends on the rows alone, not on shards and workers.

    Attributes:
        texts: (N,) the documents.
        found: their ids by the fast engine.
        rows: (N,) number of the row that each came from.
        place: their file.
    """

    texts: Texts
    found: Ids
    rows: np.ndarray
    place: str

    @classmethod
    def of(cls, texts: Texts, found: Ids, rows: np.ndarray, place: str, *, first: int = 0) -> Comparison:
        """The chosen ones of some documents; those in the ``first`` bytes belong to the start of the data."""
        chosen = sampled(rows) | (np.cumsum(texts.sizes) <= first)
        numbers = np.flatnonzero(chosen)
        starts = np.cumsum(found.lengths) - found.lengths
        values = [found.values[starts[n] : starts[n] + found.lengths[n]] for n in numbers]
        ids = Ids(np.concatenate(values) if values else found.values[:0], found.lengths[numbers])
        return cls(texts.select(numbers), ids, rows[numbers], place)

    def require_equal(self, reference: ReferenceEngine) -> None:
        """Encode them again.

        Raises:
            EngineDiffersError: names the document.
        """
        if self.texts.count and (number := first_difference(self.found, reference.encode(self.texts))) is not None:
            raise EngineDiffersError(f"{self.place}, row {self.rows[number]}")


def sampled(rows: np.ndarray) -> np.ndarray:
    """(N,) bool: which rows are compared. A mixture of the number's bits, so that no period of the data is met."""
    mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed >> np.uint64(32)) % np.uint64(ONE_IN) == 0


# --- the stress set ---------------------------------------------------------------------------------------------


def stress_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts on which engines are likely to differ, always the same for one tokenizer."""
    yield from _mixtures(tokenizer)
    yield from _vocabulary(tokenizer)
    yield from _characters()


def _characters() -> Iterator[str]:
    for number in (*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 977), *range(0xE0000, 0xE0200)):
        block = next((first for first, last in UNIFORM if first < number < last), None)
        if block is None or (number - block) % STEP == 0:
            c = chr(number)
            yield f"a{c}b {c}{c} 1{c}2\n{c}."


def _vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    for number in sorted(tokenizer.get_vocab(with_added_tokens=False).values()):
        text = tokenizer.decode([number], skip_special_tokens=False)
        if text and "�" not in text:
            yield f"{text} x {text}\n{text}"


def _mixtures(tokenizer: Tokenizer) -> Iterator[str]:
    yield ""
    added = sorted({token.content for token in tokenizer.get_added_tokens_decoder().values()})[:512]
    for token in added:
        yield f"{token}a {token} b{token}{token}\n{token}\n {token[:-1]} {token.upper()}  {token}"
    blanks = [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u200b", "\r"]
    for parts in product(blanks, repeat=3):
        yield f"a{''.join(parts)}b{parts[0] * 7}{parts[1]}c{parts[2]}"
    for count in (*range(1, 40), 127, 128, 129, 1000):
        yield f"x{' ' * count}y{chr(10) * count}z{' ' * count}"
        yield f"{'7' * count}.{'7' * count}a{'-' * count} {'=' * count}\n"
    for word in ("s", "t", "re", "ve", "m", "ll", "d", "S", "LL", "Re"):
        yield f"it'{word} I’{word} '{word} x'{word}y  '{word}\n'{word}'{word}"
    draw = random.Random(VERSION)
    alphabets = (
        "ab AB01 \n\t'.,;_-/\\\"(){}<>|",
        "aé e\u0301\u0323ı İß ǆ ﬁ ½ ² Ⅻ ٣ ४ ",
        "日本語 中文，。「」 한국어 カタカナ ひらがな ",
        "русский עברית العربية ไทย हिन्दी தமிழ் ",
        "👩‍👩‍👧 🎉🏽 🇫🇷 ☃️ 𝔘𝔫𝔦 \u200d\ufe0f\u2060\ufeff ",
        "".join(added)[:200] + " ab\n" if added else " ab\n",
    )
    for alphabet in (*alphabets, "".join(alphabets)):
        for _ in range(300):
            yield "".join(draw.choices(alphabet, k=draw.randrange(1, 120)))
    yield "a" * 65536
    yield "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=65536))
    yield "".join(draw.choices("日本語中文字漢", k=20000))
