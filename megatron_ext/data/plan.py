"""What a tokenization will do, decided and checked before the first row is encoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from megatron_ext.config import TokenizeOptions
from megatron_ext.data.chat_templates import TemplateSource, find_template, special_tokens
from megatron_ext.data.definition import Definition
from megatron_ext.data.documents import Finish
from megatron_ext.data.engines import ReferenceEngine
from megatron_ext.data.formats import AUTO, SNIFFED_ROWS, detect_format, require_columns, require_format, wanted_columns
from megatron_ext.data.idxmap import token_dtype
from megatron_ext.data.manifest import Kind
from megatron_ext.data.source_facts import FileState, file_states
from megatron_ext.data.sources import Source, expand, read_rows
from megatron_ext.data.tokenizers import load_tokenizer, read_vocabulary, require_vocabulary, tokenizer_file
from megatron_ext.errors import ConfigError, DatasetFormatError, EmptyFileError, VocabularyError
from megatron_ext.folders import require_space
from megatron_ext.hf_folder import tokenizer_digest

OUTPUT_VERSION = 4
"""Of what is written for the same input; leftovers of another version are not gone on with."""
SMALL_BYTES = 4 << 20
"""Up to this much data one process and the reference do the work: anything faster would not have started by then."""
ONE_PROCESS_BYTES = 64 << 20
"""Up to this many bytes of conversations are rendered in one process: in the time that others take to start."""
NAMED_FILES = 3
PACKED = 4
"""How much larger compressed data may be when it is read."""
KINDS: dict[str, Kind] = {"text": "text", "preference": "preference"}
"""Format -> kind of the dataset, where it is not chat."""


@dataclass(frozen=True)
class Plan:
    """A tokenization whose input was checked as far as it can be without reading all of it.

    Attributes:
        sources, formats, whys: the files, the format of each, and what decided it (one sentence for each reason).
        kind: of the dataset.
        folder: the Hugging Face folder with the tokenizer.
        definition: the tokenizer's; None for the Python one.
        reference: the tokenizer itself, loaded when it is first needed.
        vocabulary: id of each of its tokens; all are below ``id_limit``.
        template: how conversations are rendered; None for text.
    """

    sources: list[Source]
    formats: list[str]
    whys: list[str]
    kind: Kind
    options: TokenizeOptions
    folder: Path
    definition: Definition | None
    reference: ReferenceEngine
    vocabulary: dict[str, int]
    id_limit: int
    template: TemplateSource | None
    finish: Finish

    @property
    def dtype(self) -> np.dtype:
        """Type of token ids on disk."""
        return token_dtype(max(len(self.vocabulary), self.id_limit))

    @cached_property
    def is_small(self) -> bool:
        """Whether all files together are plain ones of at most ``SMALL_BYTES``."""
        size = None if any(map(_is_packed, self.sources)) else text_size(self.sources)
        return size is not None and size <= SMALL_BYTES

    @cached_property
    def wants_processes(self) -> bool:
        """Whether there are more conversations than ``ONE_PROCESS_BYTES``, or maybe so."""
        size = text_size(self.sources)
        return size is None or size > ONE_PROCESS_BYTES

    @cached_property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer's files."""
        return tokenizer_digest(self.folder)

    @cached_property
    def states(self) -> list[FileState]:
        """What tells whether each file is still the same, as of the first look."""
        return file_states(self.sources)

    @cached_property
    def identity(self) -> str:
        """What decides the result, the engine left out, which must not matter; files by name, size, time and inode."""
        template = None if self.template is None else self.template.text
        values = [
            OUTPUT_VERSION,
            self.options.model_dump(exclude={"chat_template", "on_bad_row"}),  # the journal says what was skipped
            template,
            self.tokenizer_digest,
            self.formats,
            [(str(s), s.weight, s.input, s.entry, state) for s, state in zip(self.sources, self.states, strict=True)],
        ]
        return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def make_plan(
    files: Sequence[str | Path | Source], folder: Path, out: Path, options: TokenizeOptions, extra_vocab_size: int = 0
) -> Plan:
    """Check what can be checked at once, and decide formats, kind and ids. Nothing is written.

    Raises:
        SourceError: a file or the tokenizer is missing or unreadable.
        DatasetFormatError: the first rows of a file fit no format, or files of different kinds are mixed.
        ChatTemplateError: the template is unknown or missing.
        VocabularyError: the tokenizer does not fit the model of its folder, or lacks a mark that was asked for.
        ConfigError: options that do not go together.
        DiskSpaceError: too little room for the result in ``out``.
    """
    require_format(options.format)
    require_columns(options.columns, options.format)
    sources = expand(list(files))
    slow = options.slow_tokenizer
    definition = None if slow else Definition.read(tokenizer_file(folder))
    reference = ReferenceEngine(load=lambda: load_tokenizer(folder, slow=slow))
    vocabulary = read_vocabulary(folder, definition, lambda: reference.tokenizer)
    largest = require_vocabulary(vocabulary, folder, extra_vocab_size)
    if (size := text_size(sources)) is not None:
        values = token_dtype(max(len(vocabulary), largest + 1)).itemsize + (options.format != "text")
        # a token for every two bytes of text, which is rather too many
        needed = size * values // 2 + tokenizer_file(folder).stat().st_size
        require_space(out, needed, "the dataset")
    notes: list[str] = []
    if options.on_bad_row == "skip":
        sources, notes = _filled(sources)
    formats, whys = zip(*(_format_of(source, options) for source in sources), strict=True)
    kind = _kind(sources, formats)
    if options.overlong == "split" and kind != "text":
        raise ConfigError(f"overlong split is for text; {kind} data can be truncated or dropped")
    _require_used(options, kind)
    finish = Finish(
        bos=_mark(vocabulary, folder, "bos_token", "prepend_bos") if options.prepend_bos else None,
        eod=_mark(vocabulary, folder, "eos_token", "append_eod") if options.append_eod else None,
        max_length=options.max_length,
        overlong=options.overlong,
    )
    template = None if kind == "text" else find_template(options.chat_template, folder)
    if template is not None:
        from megatron_ext.data.rendering import ChatTemplate

        ChatTemplate(template, special_tokens(folder))
    return Plan(
        sources,
        list(formats),
        [*_grouped(sources, whys), *notes],
        kind,
        options,
        folder,
        definition,
        reference,
        vocabulary,
        largest + 1,
        template,
        finish,
    )


def text_size(sources: Sequence[Source]) -> int | None:
    """Bytes of all files when unpacked, rather too many; None where a server does not say."""
    total = 0
    for source in sources:
        if (size := source.size()) is None:
            return None
        total += size * (PACKED if _is_packed(source) else 1)
    return total


def _is_packed(source: Source) -> bool:
    return source.compression is not None or source.kind in (".parquet", ".arrow")


def _filled(sources: list[Source]) -> tuple[list[Source], list[str]]:
    """The files that hold rows, and a note about each that holds none."""
    filled, notes = [], []
    for source in sources:
        try:
            next(iter(read_rows(source, on_bad=lambda number, error: None)), None)
            filled.append(source)
        except EmptyFileError:
            notes.append(f"{source} holds no rows and is passed over")
    if not filled:
        raise EmptyFileError(f"no file holds any rows: {', '.join(map(str, sources[:3]))}; fill one")
    return filled, notes


def _format_of(source: Source, options: TokenizeOptions) -> tuple[str, str]:
    if options.format != AUTO:
        return options.format, f"{source.name}: format {options.format} was asked for"
    skipped = (lambda number, error: None) if options.on_bad_row == "skip" else None
    columns = {} if source.kind == ".txt" else options.columns  # its lines have one name, whatever other files say
    rows = read_rows(source, wanted_columns(AUTO, columns), on_bad=skipped)
    return detect_format(islice(rows, SNIFFED_ROWS), source, columns)


def _grouped(sources: Sequence[Source], whys: Sequence[str]) -> list[str]:
    """One sentence for all files of the same reason."""
    names: dict[str, dict[str, None]] = {}
    for source, why in zip(sources, whys, strict=True):
        names.setdefault(why.removeprefix(f"{source.name}: "), {})[source.name] = None
    grouped = []
    for why, held in names.items():
        more = f" and {len(held) - NAMED_FILES} more" if len(held) > NAMED_FILES else ""
        grouped.append(f"{', '.join([*held][:NAMED_FILES])}{more}: {why}")
    return grouped


def _kind(sources: Sequence[Source], formats: Sequence[str]) -> Kind:
    kinds: list[Kind] = [KINDS.get(format, "chat") for format in formats]
    for source, kind in zip(sources, kinds, strict=True):
        if kind != kinds[0]:
            raise DatasetFormatError(
                f"{sources[0]} is {kinds[0]} data, but {source} is {kind} data; a dataset holds one kind, "
                "make one of each"
            )
    return kinds[0]


def _require_used(options: TokenizeOptions, kind: Kind) -> None:
    """Refuse what only conversations can be asked for. A chat template of text is noted: evaluation may ask with it."""
    why = {"text": "text is trained as a whole", "preference": "of a pair the answers alone are trained"}.get(kind)
    for name in ("last_turn_only", "train_on_prompt"):
        if why and getattr(options, name):
            raise ConfigError(f"{name} is for conversations, but this is {kind} data: {why}; leave {name} out")


def _mark(vocabulary: dict[str, int], folder: Path, name: str, option: str) -> int:
    text = special_tokens(folder).get(name)
    number = None if text is None else vocabulary.get(text)
    if number is None:
        what = f"names no {name}" if text is None else f"has no token {text!r}, its {name}"
        raise VocabularyError(
            f"{option} needs it, but the tokenizer of {folder} {what}; set {name} in tokenizer_config.json"
        )
    return number
