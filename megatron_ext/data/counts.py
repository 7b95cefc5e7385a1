"""What was read and what became of it, added up over blocks and shards."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

NAMED = 5
"""Skipped rows that are named; the others are counted."""


@dataclass
class Counts:
    """What was read and what became of it; added up over shards. ``trained`` and ``untrained`` by side."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    skipped: int = 0
    dropped: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    answers_cut_off: int = 0
    split: int = 0
    compared_documents: int = 0
    compared_bytes: int = 0
    reference_documents: int = 0
    trained: list[int] = field(default_factory=lambda: [0, 0])
    untrained: list[int] = field(default_factory=lambda: [0, 0])
    named: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        """Add what another part counted."""
        for name in (f.name for f in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "named":
                self.named = (mine + theirs)[:NAMED]
            elif isinstance(mine, list):
                setattr(self, name, [a + b for a, b in zip(mine, theirs, strict=True)])
            else:
                setattr(self, name, mine + theirs)
