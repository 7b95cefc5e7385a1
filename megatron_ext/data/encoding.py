"""Rendered conversations to token ids and loss mask, a batch at a time, with the tokenizer that the model brings."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_ext.data.chat_templates import read_tokenizer_config
from megatron_ext.data.rendering import Rendered, Span
from megatron_ext.errors import SourceError, VocabularyError
from megatron_ext.hf_folder import read_config


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


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer in a Hugging Face folder, without the truncation and padding it may ask for.

    Raises:
        SourceError: there is no tokenizer.json, or it cannot be read.
        VocabularyError: tokenizer_config.json adds tokens that tokenizer.json does not know.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SourceError(
            f"{folder} has no tokenizer.json, which tokenizing needs; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    tokenizer = read_tokenizer(path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = read_tokenizer_config(folder).get("added_tokens_decoder") or {}
    for number, token in added.items():
        if (content := token["content"]) not in vocabulary:
            raise VocabularyError(
                f"{folder}: tokenizer_config.json adds token {content!r} as id {number}, but tokenizer.json lacks it; "
                "save the tokenizer again with transformers' save_pretrained"
            )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without truncation and padding."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (tokenizers raises no narrower class)
        raise SourceError(f"{path} is not a readable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_vocabulary(tokenizer: Tokenizer, folder: Path) -> tuple[int, int]:
    """Refuse a tokenizer that can produce ids the model of the same folder has no embedding for.

    Returns:
        Number of tokens, largest id.

    Raises:
        VocabularyError: names the token, its id and the model's vocab_size.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if (folder / "config.json").is_file():
        config = read_config(folder)
        rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
        if isinstance(rows, int) and largest >= rows:
            raise VocabularyError(
                f"the tokenizer of {folder} has token {token!r} with id {largest}, but the model's vocab_size is "
                f"{rows} (config.json); use the tokenizer that the model was trained with, or another model"
            )
    return len(vocabulary), largest


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
