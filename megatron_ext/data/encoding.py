"""Rendered conversations to token ids and loss mask, a batch at a time, with the tokenizer that the model brings."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_ext.data.rendering import Rendered, Span
from megatron_ext.data.tokenizers import load_tokenizer, read_tokenizer, require_vocabulary

__all__ = ["Batch", "encode", "load_tokenizer", "read_tokenizer", "require_vocabulary", "to_arrays", "token_span"]


class Batch(NamedTuple):
    """Encoded documents one after the other.

    Attributes:
        ids: (T,) int32 token ids.
        mask: (T,) uint8, 1 where the token is trained.
        lengths: (N,) int64 tokens in each document; a document may be empty.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray


def encode(tokenizer: Tokenizer, documents: list[Rendered]) -> list[Encoding]:
    """Encode without adding special tokens (the chat template wrote them), as transformers does after rendering."""
    return tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)


def to_arrays(encodings: list[Encoding], documents: list[Rendered]) -> Batch:
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


def token_span(encoding: Encoding, span: Span) -> tuple[int, int]:
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
