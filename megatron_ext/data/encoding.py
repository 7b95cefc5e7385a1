"""Which tokens of a rendered conversation are trained: those that overlap what the assistant wrote.

The fast engine gives ids alone. Where the bytes of a document's tokens, one after the other, are the document's own
bytes, each token's place follows from them exactly; any other document is encoded by the reference, which knows the
characters of each token, and must give the same ids.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from megatron_ext.data.documents import Batch, from_zero
from megatron_ext.data.engine_proof import EngineDiffersError
from megatron_ext.data.engines import REFERENCE_BYTES, GigatokenEngine, Ids, ReferenceEngine, Texts, portions
from megatron_ext.data.rendering import Rendered, Span

BLANK = "▁".encode()
"""What a space is in the pieces of sentencepiece."""
MASKED_BYTES = 1 << 20
"""Text whose masks are made at once: several numbers for every byte and token are held meanwhile."""


def encode(tokenizer: Any, documents: list[Rendered]) -> list[Any]:
    """Encode without adding special tokens (the chat template wrote them), as transformers does after rendering."""
    return tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)


def encode_by_reference(engine: ReferenceEngine, documents: list[Rendered]) -> Batch:
    """Ids and mask of rendered conversations, a part at a time."""
    bounds = np.cumsum([0, *(len(document.text) for document in documents)])
    parts = [documents[first:last] for first, last in portions(bounds, REFERENCE_BYTES)]
    return joined([to_arrays(encode(engine.tokenizer, part), part) for part in parts])


def joined(batches: list[Batch]) -> Batch:
    """Several batches with masks as one."""
    if len(batches) == 1:
        return batches[0]
    ids, masks, lengths = (list(values) for values in zip(*batches, strict=True))
    return Batch(np.concatenate(ids), np.concatenate(masks), np.concatenate(lengths))


def to_arrays(encodings: list[Any], documents: list[Rendered]) -> Batch:
    """Ids and loss mask of encoded documents; a token that overlaps a span is trained."""
    lengths = np.fromiter(map(len, encodings), dtype=np.int64, count=len(encodings))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int32, count=total)
    mask = np.zeros(total, dtype=np.uint8)
    offset = 0
    for encoding, document, length in zip(encodings, documents, lengths.tolist(), strict=True):
        for span in document.spans:
            first, last = token_span(encoding, span)
            mask[offset + first : offset + last] = 1
        offset += length
    return Batch(ids, mask, lengths)


def token_span(encoding: Any, span: Span) -> tuple[int, int]:
    """Tokens ``[first, last)`` that overlap the characters ``[start, end)``.

    A character may be in no token (a normalizer dropped it) or in several (bytes of one character).
    """
    start, end = span
    first = encoding.char_to_token(start)
    while first is None and (start := start + 1) < end:
        first = encoding.char_to_token(start)
    if first is None:
        return 0, 0
    at = end - 1
    while (final := encoding.char_to_token(at)) is None:
        at -= 1
    last = final + 1
    while last < len(encoding) and (chars := encoding.token_to_chars(last)) is not None and chars[0] < end:
        last += 1
    return first, last


class MaskMaker:
    """Masks of documents that the fast engine encoded."""

    def __init__(self, engine: GigatokenEngine, reference: ReferenceEngine) -> None:
        self._reference = reference
        self._trims = _trims_offsets(engine.definition.facts.get("post_processor"))
        table = engine.token_bytes
        tokens = [table.data[a:b].tobytes() for a, b in zip(table.bounds[:-1], table.bounds[1:], strict=True)]
        self._pieces = bool(engine.definition.model.get("byte_fallback"))
        if self._pieces:
            tokens = [token.replace(BLANK, b" ") for token in tokens]
        self._bytes = np.frombuffer(b"".join(tokens), np.uint8)
        self._sizes = np.array([len(token) for token in tokens], dtype=np.int32)
        self._starts = np.cumsum(self._sizes, dtype=np.int32) - self._sizes
        self._spaced = np.array([token.startswith(b" ") for token in tokens], dtype=bool)
        added = {n: token.content.encode() for n, token in reference.tokenizer.get_added_tokens_decoder().items()}  # type: ignore[union-attr]
        self._added = np.array([added.get(number) == token for number, token in enumerate(tokens)], dtype=bool)

    def mask(self, documents: list[Rendered], texts: Texts, ids: Ids) -> np.ndarray:
        """(T,) uint8: 1 where a token overlaps a span.

        Raises:
            EngineDiffersError: the reference gives other ids for one of the documents.
        """
        mask = np.empty(len(ids.values), dtype=np.uint8)
        ends = from_zero(np.cumsum(ids.lengths))
        for first, last in portions(texts.bounds, MASKED_BYTES):
            start, end = texts.bounds[[first, last]].tolist()
            width = np.int32 if end - start < 1 << 31 else np.int64
            part = Texts(texts.data[start:end], (texts.bounds[first : last + 1] - start).astype(width))
            tokens = slice(int(ends[first]), int(ends[last]))
            mask[tokens] = self._part(documents[first:last], part, Ids(ids.values[tokens], ids.lengths[first:last]))
        return mask

    def _part(self, documents: list[Rendered], texts: Texts, ids: Ids) -> np.ndarray:
        """``mask`` of so few documents that what is held for each byte and token is little."""
        token_starts, known = self._places(texts, ids)
        mask = self._from_places(documents, texts, token_starts, known)
        ends = np.cumsum(ids.lengths)
        for number in np.flatnonzero(~known).tolist():
            start, end = int(ends[number] - ids.lengths[number]), int(ends[number])
            batch = encode_by_reference(self._reference, [documents[number]])
            if not np.array_equal(batch.ids, ids.values[start:end]):
                raise EngineDiffersError(f"document {documents[number].text[:60]!r}")
            mask[start:end] = batch.mask
        return mask

    def _places(self, texts: Texts, ids: Ids) -> tuple[np.ndarray, np.ndarray]:
        """Byte at which each token starts (T,), ascending; and of which documents (N,) that is known.

        Sentencepiece puts a space before a document, and with some tokenizers behind each special token, that is not
        in the text: all three are tried. A token that is such a space alone stands where the next one does.
        """
        document_of = np.repeat(np.arange(texts.count, dtype=np.int32), ids.lengths)
        starts = texts.bounds[document_of]
        known = ids.lengths == 0
        first = np.zeros(len(ids.values), dtype=bool)
        first[(np.cumsum(ids.lengths) - ids.lengths)[ids.lengths > 0]] = True
        guesses = [np.zeros_like(first)]
        if self._pieces and len(first):
            spaced = self._spaced[ids.values]
            behind = np.append(False, self._added[ids.values][:-1])
            guesses = [(first | behind) & spaced, first & spaced, *guesses]
        for unwritten in guesses:
            sizes = self._sizes[ids.values] - unwritten
            ends = np.cumsum(sizes, dtype=texts.bounds.dtype)
            bounds = from_zero(ends)[from_zero(np.cumsum(ids.lengths))]  # bytes of the tokens up to each document
            before = bounds[:-1]
            found = ~known & (np.diff(bounds) == texts.sizes)
            empty = np.bincount(document_of[(sizes < 1) & ~unwritten], minlength=texts.count) > 0
            found &= ~empty
            tokens = found[document_of]
            written = self._written(ids.values[tokens], sizes[tokens], unwritten[tokens])
            original = texts.data[texts.bounds[0] : texts.bounds[-1]][np.repeat(found, texts.sizes)]
            if not np.array_equal(written, original):
                wrong = np.repeat(np.flatnonzero(found), texts.sizes[found])[written != original]
                found[wrong] = False
                tokens = found[document_of]
            places = ends - sizes - before[document_of] + texts.bounds[document_of]
            starts[tokens] = places[tokens]
            known |= found
        return starts, known

    def _written(self, ids: np.ndarray, sizes: np.ndarray, unwritten: np.ndarray) -> np.ndarray:
        """The bytes of some tokens one after the other."""
        ends = np.cumsum(sizes, dtype=np.int64 if sizes.sum(dtype=np.int64) >> 31 else np.int32)
        shift = self._starts[ids] + unwritten - (ends - sizes)
        places = np.repeat(shift, sizes)
        places += np.arange(len(places), dtype=places.dtype)
        return self._bytes[places]

    def _from_places(
        self, documents: list[Rendered], texts: Texts, token_starts: np.ndarray, known: np.ndarray
    ) -> np.ndarray:
        """The mask of the known documents; one whose spans trimmed offsets may move is marked as unknown."""
        spans: list[tuple[int, int]] = []
        owners: list[int] = []
        sizes = texts.sizes.tolist()
        for number, (document, start) in enumerate(zip(documents, texts.bounds.tolist(), strict=False)):
            text = document.text
            ascii_only = len(text) == sizes[number]
            for first, last in document.spans:
                if not ascii_only:
                    before = len(text[:first].encode())
                    first, last = before, before + len(text[first:last].encode())
                spans.append((start + first, start + last))
                owners.append(number)
        places = np.array(spans, dtype=np.int64).reshape(-1, 2)
        of = np.array(owners, dtype=np.int64)
        firsts = np.searchsorted(token_starts, places[:, 0], side="left")
        firsts -= np.append(token_starts, -1)[firsts] != places[:, 0]  # a span that starts inside a token
        lasts = np.searchsorted(token_starts, places[:, 1], side="left")
        if self._trims and len(places):
            edges = texts.data[np.stack([places[:, 0], places[:, 1] - 1])]
            inside = token_starts[firsts] != places[:, 0]
            inside |= np.append(token_starts, texts.bounds[-1])[lasts] != places[:, 1]
            known[of[inside | (edges <= 0x20).any(axis=0) | (edges >= 0x80).any(axis=0)]] = False
        change = np.zeros(len(token_starts) + 1, dtype=np.int32)
        kept = known[of]
        np.add.at(change, firsts[kept], 1)
        np.add.at(change, lasts[kept], -1)
        return (np.cumsum(change[:-1], dtype=np.int32) > 0).astype(np.uint8)


def _trims_offsets(post_processor: dict[str, Any] | None) -> bool:
    """Whether the tokenizer leaves blanks out of the characters it ascribes to a token."""
    if post_processor is None:
        return False
    if post_processor["type"] == "Sequence":
        return any(_trims_offsets(part) for part in post_processor["processors"])
    return post_processor["type"] in ("ByteLevel", "RobertaProcessing") and post_processor.get("trim_offsets", True)
