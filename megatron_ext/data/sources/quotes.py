"""Whether the quotes of a csv file stand where they open and close fields, found while others read it."""

from __future__ import annotations

from typing import Any

import numpy as np


class Quotes:
    """A stream of csv that knows whether its quotes open and close fields, as they do in a valid file.

    Attributes:
        open: whether the last quote so far opens a field, or a part of one behind a doubled quote.
        astray: whether a quote opened a field elsewhere than at its start, or closed one elsewhere than at its end.
    """

    closed = False
    BESIDE_A_FIELD = b',\r\n"'

    def __init__(self, stream: Any) -> None:
        self.stream, self.open, self.astray = stream, False, False
        self._last = b"\n"

    def read(self, size: int = -1) -> bytes:
        """As of the stream."""
        chunk = self.stream.read(size)
        if chunk:
            self._look(chunk)
        return chunk

    def _look(self, chunk: bytes) -> None:
        closed_before = self._last == b'"' and not self.open
        values = np.frombuffer(self._last + chunk, np.uint8)
        places = np.flatnonzero(values[1:] == ord('"')) + 1
        opening = (np.arange(len(places)) + self.open) % 2 == 0
        before = values[places[opening] - 1]
        closing = places[~opening]
        behind = values[closing[closing < len(values) - 1] + 1]
        if closed_before:
            behind = np.append(behind, values[1])
        self.astray |= not np.isin(np.append(before, behind), np.frombuffer(self.BESIDE_A_FIELD, np.uint8)).all()
        self.open ^= bool(len(places) % 2)
        self._last = chunk[-1:]
