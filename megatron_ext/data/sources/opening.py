"""Data files as streams of bytes, decompressed on the way; faults become errors that name the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from megatron_ext.data.sources.places import Meter, Source, open_filesystem, require_file
from megatron_ext.errors import DatasetFormatError, EmptyFileError, RowFormatError, SourceError

if TYPE_CHECKING:
    pass

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


class Place:
    """How far a reader is, for errors: the number of the last row that was read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.row = 0

    def error(self, problem: str, row: int | None = None, field: str | None = None) -> DatasetFormatError:
        """An error of the file, or of its row ``row``."""
        if row is not None:
            return RowFormatError(self.source, row, field, problem)
        return DatasetFormatError(f"{self.source}: " + (f"field {field!r} {problem}" if field else problem))


@contextmanager
def named_faults(place: Place) -> Iterator[None]:
    """Turn what reading a file can raise into errors with file and place.

    Raises:
        SourceError: the file cannot be read at all.
        DatasetFormatError: it is damaged; says after which row.
    """
    import pyarrow

    source = place.source
    try:
        yield
    except (DatasetFormatError, SourceError):
        raise
    except FileNotFoundError:
        raise SourceError(f"data file {source} does not exist; check the path") from None
    except UnicodeDecodeError as error:
        after = f", after row {place.row}" if place.row else ""
        raise DatasetFormatError(
            f"{source}{after}: holds text that is not UTF-8 ({error.reason}); convert it"
        ) from None
    except (pyarrow.ArrowException, EOFError) as error:
        raise _damaged(place, error) from None
    except OSError as error:
        if error.errno is None and (source.compression or source.kind in (".parquet", ".arrow")):
            raise _damaged(place, error) from None
        raise SourceError(f"cannot read data file {source}: {error.strerror or error}") from None


def _damaged(place: Place, error: BaseException) -> DatasetFormatError:
    source, after = place.source, f" after row {place.row}" if place.row else ""
    kind = f"{source.kind[1:]} file" + (f" in {source.compression}" if source.compression else "")
    return DatasetFormatError(
        f"{source} is not a readable {kind}{after}: {' '.join(str(error).split())}; is it cut short or damaged?"
    )


@contextmanager
def open_bytes(source: Source) -> Iterator[IO[bytes]]:
    """The decompressed content, to be read from front to back."""
    import pyarrow

    with _open_stored(source) as stored:
        if source.compression is None:
            yield stored
            return
        if not (head := stored.read(4)):  # Arrow takes an empty file for a truncated one
            raise EmptyFileError(f"{source} holds no rows; remove it from the list or fill it")
        stored.seek(-len(head), 1)
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), source.compression) as stream:
            yield stream  # type: ignore[misc]


@contextmanager
def open_seekable(source: Source) -> Iterator[Any]:
    """The decompressed content with random access; a compressed file is unpacked into a temporary file first."""
    if source.compression is None:
        with _open_stored(source) as stored:
            yield stored
        return
    with open_bytes(source) as stream, tempfile.TemporaryFile() as unpacked:
        for chunk in chunks(stream):
            unpacked.write(chunk)
        unpacked.seek(0)
        yield unpacked


@contextmanager
def _open_stored(source: Source) -> Iterator[IO[bytes]]:
    require_file(source)
    if not source.is_url:
        with open(source.path, "rb") as file:
            yield _metered(file, source.meter)
        return
    filesystem, path = open_filesystem(source.path)
    try:
        file = filesystem.open(path, "rb")
    except FileNotFoundError:
        raise SourceError(f"data file {source} does not exist; check the URL") from None
    except Exception as error:  # noqa: BLE001 (every backend has exceptions of its own)
        why = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot open {source}: {why}; check the URL, the network and your credentials") from None
    with file:
        yield _metered(file, source.meter)


def _metered(file: Any, meter: Meter | None) -> Any:
    if meter is None:
        return file
    meter.read = 0
    return _Metered(file, meter)


class _Metered:
    """A file that tells a meter what is read."""

    def __init__(self, file: Any, meter: Meter) -> None:
        self._file, self._meter = file, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._meter.read += len(chunk)
        return chunk


def chunks(stream: IO[bytes], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The rest of a stream in pieces of at most ``size`` bytes."""
    while chunk := stream.read(size):
        yield chunk


def line_blocks(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The rest of a stream in pieces of about ``size`` bytes that end where a line ends; a BOM in front is left out.

    A longer line makes a longer piece. The first piece is an eighth of the others, so that work begins at once.
    """
    parts: list[bytes] = []
    first = True
    while chunk := stream.read(max(size // 8, 1) if first else size):
        if first:
            chunk, first = chunk.removeprefix(BOM), False
        end = chunk.rfind(b"\n") + 1
        if not end:
            parts.append(chunk)
            continue
        parts.append(chunk[:end] if end < len(chunk) else chunk)
        yield b"".join(parts) if len(parts) > 1 else parts[0]
        parts = [chunk[end:]] if end < len(chunk) else []
    if rest := b"".join(parts):
        yield rest
