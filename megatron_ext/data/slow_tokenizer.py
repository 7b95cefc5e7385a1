"""The Python tokenizer on sentencepiece, as transformers' ``LlamaTokenizer`` was up to version 4 (``use_fast=False``).

The seeds' ``--tokenizer-not-use-fast``. It differs from the fast one in blanks: at the start of a text, after a special
token, and in a row. It answers to the methods of ``tokenizers.Tokenizer`` that encoding uses, offsets included.
Source: transformers 4 ``tokenization_llama.py`` and ``PreTrainedTokenizer.tokenize``.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.chat_templates import read_tokenizer_config, special_tokens
from megatron_ext.data.tokenizers import SENTENCEPIECE, require_sentencepiece
from megatron_ext.errors import SourceError

BLANK = "▁"
"""What a space is in the pieces."""


@dataclass(frozen=True)
class Added:
    """A token that is looked for in the text before sentencepiece sees it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


class SlowEncoding:
    """Ids of one text, and the characters that each came from."""

    def __init__(self, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        self.ids, self.offsets = ids, offsets
        self._ends = [end for _, end in offsets]

    def __len__(self) -> int:
        return len(self.ids)

    def char_to_token(self, position: int) -> int | None:
        """The first token that covers a character."""
        found = bisect_right(self._ends, position)
        return found if found < len(self.ids) and self.offsets[found][0] <= position else None

    def token_to_chars(self, number: int) -> tuple[int, int] | None:
        """The characters ``[start, end)`` of a token."""
        return self.offsets[number]


class SlowTokenizer:
    """Sentencepiece with added tokens. ``legacy`` puts a blank before the text after each special token, too."""

    def __init__(
        self, model: Any, added: dict[str, Added], unk_token: str, *, legacy: bool, blank_first: bool = True
    ) -> None:
        import sentencepiece

        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self.added, self.legacy, self.unk_token = added, legacy, unk_token
        self._first = BLANK if blank_first else ""
        self._unk_pieces = len(self.pieces.encode(unk_token))
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._special_ids = {token.id for token in added.values() if token.special}

    @classmethod
    def load(cls, folder: Path) -> SlowTokenizer:
        """The Python tokenizer of a Hugging Face folder.

        Raises:
            SourceError: there is no tokenizer.model, or it is damaged.
        """
        if not (folder / SENTENCEPIECE).is_file():
            raise SourceError(
                f"{folder} has no tokenizer.model, which the slow tokenizer needs; leave --slow-tokenizer out, or "
                "download tokenizer.model of this model"
            )
        model = require_sentencepiece(folder / SENTENCEPIECE)
        config = read_tokenizer_config(folder)
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special_tokens(folder)}
        legacy, blank_first = (config.get(name) is not False for name in ("legacy", "add_prefix_space"))
        added = _added([piece.piece for piece in model.pieces], folder, config, special)
        return cls(model, added, special["unk_token"], legacy=legacy, blank_first=blank_first)

    def encode_batch(self, texts: list[str], add_special_tokens: bool = False) -> list[SlowEncoding]:
        """Ids of each text; it never adds special tokens."""
        return [self.encode(text) for text in texts]

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool = False) -> list[SlowEncoding]:
        """As ``encode_batch``."""
        return self.encode_batch(texts)

    def encode(self, text: str, add_special_tokens: bool = False) -> SlowEncoding:
        """Ids of one text; it never adds special tokens."""
        if self.legacy or not text:
            ids, offsets = self._encode(text)
            return SlowEncoding(ids, offsets)
        shift = len(self._first)
        ids, offsets = self._encode(self._first + text.replace(BLANK, " "))
        if len(ids) > 1 and ids[0] == self.pieces.piece_to_id(BLANK) and ids[1] in self._special_ids:
            ids, offsets = ids[1:], offsets[1:]
        return SlowEncoding(ids, [(max(0, start - shift), end - shift) for start, end in offsets])

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Token -> id."""
        vocabulary = {self.pieces.id_to_piece(number): number for number in range(self.pieces.get_piece_size())}
        return vocabulary | ({text: token.id for text, token in self.added.items()} if with_added_tokens else {})

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text."""
        return self.get_vocab().get(token)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        parts = self._split.split(text) if self._split else [text]  # text and added tokens in turn
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(parts):
            start, at = at, at + len(part)
            if number % 2:
                ids.append(self.added[part].id)
                offsets.append((start, at))
                continue
            if number and self.added[parts[number - 1]].rstrip:
                start, part = start + len(part) - len(part.lstrip()), part.lstrip()
            if number + 1 < len(parts) and self.added[parts[number + 1]].lstrip:
                part = part.rstrip()
            if part:
                found, places = self._pieces_of(part)
                ids += found
                offsets += [(start + first, start + last) for first, last in places]
        return ids, offsets

    def _pieces_of(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Sentencepiece on a text without added tokens; not legacy, a leading blank is kept by a word before it."""
        before = "" if self.legacy or not text.startswith((BLANK, " ")) else self.unk_token
        pieces = self.pieces.encode(before + text, return_type="proto").pieces
        places: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            places.append((at, at + len(piece.surface)))
            at += len(piece.surface)
        for number in range(len(places) - 2, -1, -1):  # the bytes of one character all cover it; its last one says so
            if places[number][0] == places[number][1] and self.pieces.is_byte(pieces[number].id):
                places[number] = places[number + 1]
        skipped = self._unk_pieces if before else 0
        shift = len(before)
        ids = [piece.id for piece in pieces[skipped:]]
        return ids, [(max(0, first - shift), last - shift) for first, last in places[skipped:]]


def _added(pieces: list[str], folder: Path, config: dict[str, Any], special: dict[str, str]) -> dict[str, Added]:
    """Added tokens: those with a number in the tokenizer's files, then special ones the model lacks, at its end."""
    numbers = {piece: number for number, piece in enumerate(pieces)}
    added: dict[str, Added] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        try:
            added = {text: Added(number, special=False) for text, number in json.loads(path.read_bytes()).items()}
        except (ValueError, AttributeError):
            raise SourceError(f"{path} is not a JSON object of tokens; download the model again") from None
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "special")}
        added[token["content"]] = Added(int(number), **flags)
    following = max([len(pieces), *(token.id + 1 for token in added.values())])
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    for text in [*special.values(), *(t.get("content") if isinstance(t, dict) else t for t in more)]:
        if text not in added:
            added[text] = Added(numbers.get(text, following))
            following += text not in numbers
    return added
