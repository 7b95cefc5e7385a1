"""What a tokenizer.json says, read as JSON: what is checked before anything starts does not wait for ``tokenizers``.

``tokenizers`` takes half a second to load a vocabulary of 100,000, during which no other thread runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import SourceError


@dataclass(frozen=True)
class Definition:
    """A tokenizer.json that asks for neither truncation nor padding.

    Attributes:
        text: of the file.
        facts: what it holds, with the numbers of the model's tokens and merges in their places.
        vocabulary: id of every token, added ones included; None where only ``tokenizers`` can tell.
    """

    text: bytes
    facts: dict[str, Any]
    vocabulary: dict[str, int] | None

    @classmethod
    def read(cls, path: Path) -> Definition:
        """The definition in a file; the truncation and padding that it may ask for are left out.

        Raises:
            SourceError: it is not readable.
        """
        try:
            return cls.of(path.read_bytes())
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} is not a readable tokenizer: {error}") from None

    @classmethod
    def of(cls, text: bytes) -> Definition:
        """The definition in the text of a file.

        Raises:
            ValueError: it is no JSON object.
        """
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError("it holds no object")
        if facts.get("truncation") or facts.get("padding"):
            facts |= {"truncation": None, "padding": None}
            text = json.dumps(facts, ensure_ascii=False).encode()
        model, vocabulary = facts.get("model") or {}, _vocabulary(facts)
        counted = {name: len(model[name]) for name in ("vocab", "merges") if model.get(name) is not None}
        return cls(text, facts | {"model": model | counted}, vocabulary)

    @property
    def model(self) -> dict[str, Any]:
        """How words become tokens."""
        return self.facts["model"]

    @property
    def normalizers(self) -> list[str]:
        """Kinds of everything that changes text before it is cut into words."""
        return _normalizers(self.facts.get("normalizer"))


def _vocabulary(facts: dict[str, Any]) -> dict[str, int] | None:
    """All tokens' ids, if those of added tokens follow the model's without a hole; else ``tokenizers`` moves them."""
    found = (facts.get("model") or {}).get("vocab")
    if not isinstance(found, dict) or not found or max(found.values()) != len(found) - 1:
        return None
    vocabulary = dict(found)
    for token in facts.get("added_tokens") or []:
        if vocabulary.setdefault(token["content"], token["id"]) != token["id"]:
            return None
    return vocabulary if max(vocabulary.values()) == len(vocabulary) - 1 else None


def _normalizers(normalizer: dict[str, Any] | None) -> list[str]:
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [kind for part in normalizer["normalizers"] for kind in _normalizers(part)]
    if normalizer["type"] == "Replace" and "String" not in normalizer["pattern"]:
        return ["Replace by a pattern"]
    return [normalizer["type"]]
