"""The elements of a JSON array, one after the other, in memory for one element and a piece of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from megatron_ext.data.sources.opening import CHUNK_BYTES, Place

SPACE = re.compile(r"[ \t\r\n]*")
TAIL = 16
"""A fault in the last characters read may be a token cut in two (``tru``, ``-1.5e``, ``\\ud83d\\ude``)."""


class _Window:
    """A piece of the text that moves forward over the stream.

    Attributes:
        text: the piece.
        at: next character to read, in ``text``.
    """

    def __init__(self, stream: IO[bytes], place: Place) -> None:
        self.stream, self.place = stream, place
        self.text, self.at = "", 0
        self.dropped = 0  # characters before text
        self.bytes_read = 0
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.ended = False
        self.broken: str | None = None  # why the stream is not UTF-8

    @property
    def offset(self) -> int:
        """Where ``at`` lies in the whole text, in characters."""
        return self.dropped + self.at

    def more(self) -> bool:
        """Read on, at least as much as there is (so that long elements stay linear); False at the end.

        Raises:
            DatasetFormatError: what follows is not UTF-8.
        """
        if self.broken:
            raise self.place.error(self.broken, self.place.row + 1)
        if self.ended:
            return False
        self.dropped += self.at
        self.text, self.at = self.text[self.at :], 0
        chunk = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.ended = not chunk
        try:
            self.text += self.decode(chunk, self.ended)
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(chunk)  # bytes of a character that began in the chunk before
            byte = self.bytes_read - pending + error.start
            self.broken = f"is not UTF-8 ({error.reason} at byte {byte} of the file); convert the file to UTF-8"
            self.text += error.object[: error.start].decode()
        self.bytes_read += len(chunk)
        return not self.ended

    def peek(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


def first_character(stream: IO[bytes], place: Place) -> str:
    """What the text starts with, spaces left out."""
    return _Window(stream, place).peek()


def elements(stream: IO[bytes], place: Place) -> Iterator[Any]:
    """Every element of the array in ``stream``; ``place.row`` is the number of the last one.

    Raises:
        DatasetFormatError: no array, not valid JSON, not UTF-8, or cut short; names the row.
    """
    window, decoder = _Window(stream, place), json.JSONDecoder()
    start = window.peek()
    if not start:
        return
    if start != "[":
        raise place.error(f"starts with {start!r}; a .json file holds an array of rows: [{{...}}, ...]")
    window.at += 1
    if window.peek() != "]":
        while True:
            element = _element(window, decoder, place)
            place.row += 1
            yield element
            separator = window.peek()
            if separator == "]":
                break
            if separator != ",":
                problem = f"{separator!r} follows row {place.row} where a comma or ] belongs"
                raise place.error(problem if separator else _cut_short(place))
            window.at += 1
            if window.peek() == "]":
                raise place.error(f"a comma without a row follows row {place.row}")
    window.at += 1
    if window.peek():
        raise place.error(f"text follows the end of the array, at character {window.offset}")


def _element(window: _Window, decoder: json.JSONDecoder, place: Place) -> Any:
    if not window.peek():
        raise place.error(_cut_short(place))
    while True:
        try:
            element, end = decoder.raw_decode(window.text, window.at)
            length = end - window.at
            if end < len(window.text) or not window.more():  # a number may go on in the next piece
                window.at += length
                return element
        except json.JSONDecodeError as error:
            left = len(window.text) - error.pos
            at = window.dropped + error.pos
            open_string = error.msg.startswith("Unterminated string")
            if (left <= TAIL or open_string) and window.more():
                continue
            if window.ended and (left <= 0 or open_string):
                raise place.error("the file ends inside this row; is it cut short?", place.row + 1) from None
            problem = f"not valid JSON ({error.msg} at character {at} of the file)"
            raise place.error(problem, place.row + 1) from None
        except ValueError as error:  # a number of more digits than Python reads
            raise place.error(f"not valid JSON ({error})", place.row + 1) from None
        except RecursionError:
            raise place.error("nested too deeply", place.row + 1) from None


def _cut_short(place: Place) -> str:
    return f"the array is not closed after row {place.row}; is the file cut short?"
