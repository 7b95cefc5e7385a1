"""What an input means: one file, a glob, a folder or a URL becomes a list of files in a fixed order."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from megatron_ext.errors import SourceError

KINDS = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".txt")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffix behind the kind -> Arrow's name of the codec."""
SUPPORTED = f"{', '.join(KINDS)}, each also with {' or '.join(COMPRESSIONS)} behind it"
SIDE_FILES = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What Hugging Face ``datasets`` writes beside the data; passed over in a folder."""
DATASET_FILES = ("manifest.json", "shards.jsonl")
"""Beside ``tokens.bin``, of a dataset that ``mflow tokenize`` made or is making."""
WEIGHT = re.compile(r"(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?):(?=.)")
MAGIC = re.compile(r"[*?\[]")


class Meter:
    """How far a file was read since it was opened last.

    Attributes:
        read: bytes, as stored.
        rows: of the whole file, where its reader knows; None elsewhere.
    """

    def __init__(self) -> None:
        self.read = 0
        self.rows: int | None = None


@dataclass(frozen=True)
class Source:
    """One file of training data.

    Attributes:
        path: path on this machine, or a URL that fsspec opens.
        weight: share of this source in a blend, relative to the others' (as in Megatron's ``--data-path``); all
            files of one glob or folder carry the weight of their input. None where none was given.
        input: what the user wrote, and the file came from.
        entry: number of that input among all that were given; files of one entry share its weight.
        meter: told how much is read, where somebody wants to know.
    """

    path: str
    weight: float | None = None
    input: str = ""
    entry: int | None = None
    meter: Meter | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.path

    @property
    def is_url(self) -> bool:
        return "://" in self.path

    @property
    def name(self) -> str:
        """Last part of the path, without the query of a URL."""
        return PurePosixPath(urlsplit(self.path).path if self.is_url else self.path).name

    @property
    def compression(self) -> str | None:
        """Arrow's name of the codec, or None."""
        return COMPRESSIONS.get(PurePosixPath(self.name).suffix.lower())

    @property
    def kind(self) -> str:
        """Suffix that says how to read it, in lower case, compression left out; empty if there is none."""
        name = PurePosixPath(self.name)
        return (PurePosixPath(name.stem) if self.compression else name).suffix.lower()

    def size(self) -> int | None:
        """Bytes as stored, or None where the server does not say.

        Raises:
            SourceError: the file is not there, or its URL cannot be opened.
        """
        if not self.is_url:
            require_file(self)
            return Path(self.path).stat().st_size
        filesystem, path = open_filesystem(self.path)
        return _asked(self.path, filesystem.info, path).get("size")


def as_source(source: Source | str | Path) -> Source:
    """``source`` itself, or the source of that path."""
    return source if isinstance(source, Source) else Source(str(source))


def require_file(source: Source | str | Path) -> None:
    """Refuse what no reader can read, without opening it; a URL is judged by its name alone.

    Raises:
        SourceError: missing, a folder, a pipe, or of an unsupported kind.
    """
    source = as_source(source)
    path = None if source.is_url else Path(source.path)
    if path is not None and path.is_dir():
        raise SourceError(f"{source} is a folder; name the files in it ({SUPPORTED})")
    if path is not None and (source.path == "-" or (path.exists() and not path.is_file())):
        raise SourceError(f"{source} is no regular file, and data is read more than once; write it to a file first")
    if source.kind not in KINDS:
        raise SourceError(f"{source} is of no supported kind; supported: {SUPPORTED}")
    if path is not None and not path.exists():
        raise SourceError(f"data file {source} does not exist; check the path")


def expand(inputs: Sequence[str | Path | Source]) -> list[Source]:
    """The files that the inputs mean: inputs in their order, the files of a glob or folder sorted by path.

    Args:
        inputs: a file, a glob (``data/**/*.jsonl``), a folder (searched recursively; files of other kinds, hidden
            ones, Hugging Face's side files and tokenized datasets are passed over) or an fsspec URL of one of these,
            each with an optional weight in front: ``0.7:data/web/*.jsonl``. What this gave before comes out as it is.

    Raises:
        SourceError: nothing is there, a kind is not supported, a file is named twice, a weight is not a positive
            number, or the package that opens a URL is not installed.
    """
    found: dict[str, Source] = {}
    for entry, given in enumerate(inputs):
        for source in _meant(given, entry):
            place = source.path if source.is_url else os.path.realpath(source.path)
            if twin := found.get(place):
                also = "" if twin.path == source.path else f" (it is {twin.path}, too)"
                raise SourceError(
                    f"{source}{also} is named twice, by {twin.input} and {source.input}; name it once, with a weight "
                    f"in front (2:{source}) if it should count more"
                )
            found[place] = source
    if not found:
        raise SourceError(f"no data files were given; name at least one ({SUPPORTED})")
    for source in found.values():
        require_file(source)
    return list(found.values())


def _meant(given: str | Path | Source, entry: int) -> list[Source]:
    """The files that one input means. A source is a file already, and knows which input named it."""
    if isinstance(given, Source):
        known = {"input": given.input or given.path, "entry": entry if given.entry is None else given.entry}
        return [replace(given, **known)]
    text, weight = _weighted(given)
    return [Source(path, weight, str(given), entry) for path in _paths(text)]


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        SourceError: unknown protocol, or its package is not installed; names the package.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        package = (missing or "").partition(".")[0]
        install = f"pip install {package}" if package else str(error)
        raise SourceError(f"{url} needs a package that is not installed: {install}") from None
    except ValueError as error:
        raise SourceError(f"{url} cannot be opened: {error}") from None


def _weighted(given: str | Path) -> tuple[str, float | None]:
    text = str(given)
    match = WEIGHT.match(text)
    if not match or Path(text).exists():
        return text, None
    weight = float(match[1])
    if not (weight > 0 and math.isfinite(weight)):
        raise SourceError(f"the weight of {text} is {match[1]}; a weight is a number greater than 0")
    return text[match.end() :], weight


def _paths(text: str) -> list[str]:
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" in text:
        return _remote_paths(text)
    path = Path(text)
    if path.is_dir():
        return _of_folder(text, [str(file) for file in path.rglob("*") if file.is_file()], len(str(path)))
    if path.exists() or not MAGIC.search(text):
        return [str(path)]
    return _of_glob(text, [str(Path(file)) for file in glob.glob(text, recursive=True) if Path(file).is_file()])


def _remote_paths(url: str) -> list[str]:
    """A URL with a query (``?``) is no glob; a web server has no folders."""
    filesystem, path = open_filesystem(url)
    web = url.startswith(("http://", "https://"))
    if "*" in url if web else MAGIC.search(url):
        matches = _asked(url, filesystem.glob, path, detail=True)
        files = [filesystem.unstrip_protocol(name) for name, entry in matches.items() if entry["type"] == "file"]
        return _of_glob(url, files)
    if not web and _asked(url, filesystem.info, path)["type"] == "directory":
        files = [filesystem.unstrip_protocol(name) for name in _asked(url, filesystem.find, path)]
        return _of_folder(url, files, len(filesystem.unstrip_protocol(path)))
    return [url]


def _asked(url: str, question: Any, *args: Any, **options: Any) -> Any:
    """The answer of a remote file system; every backend has exceptions of its own."""
    try:
        return question(*args, **options)
    except FileNotFoundError:
        raise SourceError(f"data file {url} does not exist; check the URL") from None
    except Exception as error:  # noqa: BLE001 (see above)
        why = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"cannot look at {url}: {why}; check the URL, the network and your credentials") from None


def _of_glob(pattern: str, files: list[str]) -> list[str]:
    if not files:
        raise SourceError(f"no file matches {pattern}; check the pattern")
    return sorted(files)


def _of_folder(folder: str, files: list[str], prefix: int) -> list[str]:
    """The data files of a folder, whose path is the first ``prefix`` characters of theirs."""
    kept, made = [], _datasets(files)
    for file in sorted(files):
        parts = [part for part in re.split(r"[/\\]", file[prefix:]) if part]
        hidden = any(part.startswith((".", "_")) for part in parts)
        hidden = hidden or any(file.startswith(f"{dataset}/") for dataset in made)
        if Source(file).kind in KINDS and parts[-1] not in SIDE_FILES and not hidden:
            kept.append(file)
    if not kept:
        raise SourceError(f"folder {folder} holds no data files; supported: {SUPPORTED}")
    return kept


def _datasets(files: list[str]) -> set[str]:
    """Folders that hold a tokenized dataset, or one that is being made; its .json files are no data."""
    found, there = set(), set(files)
    for file in files:
        folder, _, name = file.rpartition("/")
        if name.endswith("tokens.bin") and any(f"{folder}/{other}" in there for other in DATASET_FILES):
            found.add(folder)
    return found
