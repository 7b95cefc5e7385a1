"""Data files to a tokenized dataset: check every row, render, encode, write idxmaps and manifest.

Two passes: the first reads every row and refuses what does not fit before anything is written; the second renders
on this thread while the tokenizer's threads encode the batch before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from megatron_ext.data import manifest as names
from megatron_ext.data.chat_templates import find_template, special_tokens
from megatron_ext.data.encoding import Batch, encode, load_tokenizer, require_vocabulary, to_arrays
from megatron_ext.data.formats import AUTO, FIELDS, SNIFFED_ROWS, Conversation, detect_format, parse_row, require_format
from megatron_ext.data.idxmap import IdxmapWriter, token_dtype
from megatron_ext.data.manifest import DatasetManifest, LengthStatistics, SourceFile, TemplateRecord
from megatron_ext.data.rendering import ChatTemplate, Rendered
from megatron_ext.data.sources import read_rows, require_file
from megatron_ext.errors import ChatTemplateError, DatasetFormatError, SourceError
from megatron_ext.events import Events
from megatron_ext.folders import digest_file, full_disk_named, require_space
from megatron_ext.hf_folder import tokenizer_digest
from megatron_ext.worker import Job

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 21
OUTPUTS = ("tokens.bin", "tokens.idx", "loss_mask.bin", "loss_mask.idx", names.TOKENIZER, names.NAME)


@dataclass(frozen=True)
class CheckedFile:
    """A data file whose rows all fit."""

    path: Path
    format: str
    why: str
    rows: int
    digest: str


@dataclass
class Statistics:
    """What the second pass counts."""

    lengths: list[np.ndarray] = field(default_factory=list)
    trained_tokens: int = 0
    untrained_documents: int = 0
    max_token_id: int = 0

    def add(self, batch: Batch) -> None:
        starts = np.cumsum(batch.lengths) - batch.lengths
        trained = np.add.reduceat(batch.mask, starts, dtype=np.int64)
        self.lengths.append(batch.lengths)
        self.trained_tokens += int(trained.sum())
        self.untrained_documents += int((trained == 0).sum())
        self.max_token_id = max(self.max_token_id, int(batch.ids.max()))


def run(job: Job, events: Events) -> dict[str, Any]:
    """The worker's entry: inputs ``files`` and ``tokenizer``, config ``format`` and ``chat_template``."""
    return tokenize(
        [Path(file) for file in job.inputs["files"]],
        Path(job.inputs["tokenizer"]),
        job.out,
        format=job.config.get("format", AUTO),
        chat_template=job.config.get("chat_template"),
        events=events,
    )


def tokenize(
    files: list[Path], tokenizer: Path, out: Path, *, format: str, chat_template: str | None, events: Events
) -> dict[str, Any]:
    """Tokenize chat data into the dataset folder ``out``, loss mask included; the bytes depend on the input alone.

    Args:
        files: .json, .jsonl or .parquet files, in the order in which their rows are written.
        tokenizer: Hugging Face folder with tokenizer.json, and config.json if the vocabulary is to be checked.
        out: folder to write; what a killed attempt left there is cleared.
        format: ``auto`` or a name in ``formats.FORMATS``.
        chat_template: None for the model's own, else a name or the path of a Jinja file.

    Returns:
        Counts, the format and the rate.

    Raises:
        SourceError: a file or the tokenizer is missing or unreadable.
        DatasetFormatError: a row does not fit; names file, row and field. Or no token, or every token, is trained.
        ChatTemplateError: the template is unknown, missing, or refuses a row.
        VocabularyError: the tokenizer does not fit the model of its folder.
        DiskSpaceError: too little room for the result.
    """
    started = time.monotonic()
    require_format(format)
    if not files:
        raise SourceError("no data files were given; name at least one .json, .jsonl or .parquet file")
    for path in files:
        require_file(path)
    source = find_template(chat_template, tokenizer)
    template = ChatTemplate(source, special_tokens(tokenizer))
    encoder = load_tokenizer(tokenizer)
    vocab_size, largest = require_vocabulary(encoder, tokenizer)
    dtype = token_dtype(max(vocab_size, largest + 1))
    require_space(out, _estimated_bytes(files, dtype) + (tokenizer / names.TOKENIZER).stat().st_size, "the dataset")
    for note in remarks(template, encoder):
        events.note(note)
    checked = [check_file(path, format, template, events) for path in files]
    out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS:
        (out / name).unlink(missing_ok=True)
    with full_disk_named(out):
        statistics = _write(checked, template, encoder, out, dtype, events)
        shutil.copyfile(tokenizer / names.TOKENIZER, out / names.TOKENIZER)
        lengths = np.concatenate(statistics.lengths)
        manifest = DatasetManifest(
            documents=len(lengths),
            tokens=int(lengths.sum()),
            trained_tokens=statistics.trained_tokens,
            untrained_documents=statistics.untrained_documents,
            vocab_size=vocab_size,
            max_token_id=statistics.max_token_id,
            tokenizer_digest=tokenizer_digest(tokenizer),
            chat_template=TemplateRecord(name=source.name, digest=source.digest),
            row_format=", ".join(sorted({file.format for file in checked})),
            why="; ".join(file.why for file in checked),
            dtype=dtype.name,
            lengths=LengthStatistics.of(lengths),
            files=tuple(SourceFile(name=f.path.name, rows=f.rows, digest=f.digest, format=f.format) for f in checked),
        )
        _require_sensible_mask(manifest, source.name)
        manifest.write(out)
    seconds = time.monotonic() - started
    kept = manifest.model_dump(
        include={"documents", "tokens", "trained_tokens", "untrained_documents", "row_format", "why", "dtype"}
    )
    rate = round(manifest.documents / seconds, 1)
    return {**kept, "chat_template": source.name, "seconds": round(seconds, 3), "documents_per_second": rate}


def remarks(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What a person should know about this template with this tokenizer, before hours of training show it."""
    notes, name = [], f"chat template {template.name!r}"
    if template.writes_date:
        notes.append(f"{name} writes today's date into samples; a dataset made another day differs")
    if not template.probed:
        return notes
    if not template.end_marker:
        notes.append(f"{name} writes no end marker after an answer; the model will not learn to stop")
        return notes
    if not template.trains_end_marker:
        notes.append(f"{name} leaves the end marker out of its {{% generation %}}; the model will not learn to stop")
    pieces = len(tokenizer.encode(template.end_marker.strip(), add_special_tokens=False).ids)
    if pieces > 1:
        notes.append(f"the end marker {template.end_marker.strip()!r} of {name} is {pieces} tokens in this tokenizer")
    return notes


def check_file(path: Path, format: str, template: ChatTemplate, events: Events) -> CheckedFile:
    """Read every row of a file once: its format, and that all rows fit it.

    Raises:
        SourceError, DatasetFormatError: as ``tokenize``.
    """
    why = f"{path.name}: format {format} was asked for"
    if format == AUTO:
        format, why = detect_format(islice(read_rows(path), SNIFFED_ROWS), path)
    takes_tools: bool | None = None
    rows = 0
    for number, conversation in _conversations(path, format):
        rows += 1
        if conversation.uses_tools:
            takes_tools = template.takes_tools() if takes_tools is None else takes_tools
            if not takes_tools:
                raise DatasetFormatError(
                    f"{path}, row {number}: has tools, tool calls or tool answers, but chat template {template.name!r} "
                    "has no place for them; name one that has (qwen2.5), or leave such rows out"
                )
    events.note(f"{rows} rows of format {format} ({why})")
    return CheckedFile(path, format, why, rows, digest_file(path))


def _conversations(path: Path, format: str) -> Iterator[tuple[int, Conversation]]:
    for number, row in read_rows(path, FIELDS):
        parsed = parse_row(row, format, path, number)
        if not isinstance(parsed, Conversation):
            raise DatasetFormatError(f"{path}: format {format} holds no conversations")
        yield number, parsed


def _rendered(files: list[CheckedFile], template: ChatTemplate) -> Iterator[tuple[str, Rendered]]:
    """Every document with its place in words."""
    for file in files:
        for number, conversation in _conversations(file.path, file.format):
            place = f"{file.path}, row {number}"
            try:
                document = template.render(conversation)
                document.text.encode()
            except ChatTemplateError as error:
                raise ChatTemplateError(f"{place}: {error}") from None
            except UnicodeEncodeError:
                raise DatasetFormatError(
                    f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
                ) from None
            yield place, document


def _batches(documents: Iterator[tuple[str, Rendered]]) -> Iterator[tuple[list[str], list[Rendered]]]:
    places: list[str] = []
    batch: list[Rendered] = []
    characters = 0
    for place, document in documents:
        places.append(place)
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield places, batch
            places, batch, characters = [], [], 0
    if batch:
        yield places, batch


def _encoded(
    files: list[CheckedFile], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[tuple[list[str], Batch]]:
    """Batches in order; one is being encoded while the next is rendered."""
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[str], list[Rendered], Future[list[Encoding]]] | None = None
        for places, documents in _batches(_rendered(files, template)):
            started = pool.submit(encode, tokenizer, documents)
            if waiting:
                yield waiting[0], to_arrays(waiting[2].result(), waiting[1])
            waiting = places, documents, started
        if waiting:
            yield waiting[0], to_arrays(waiting[2].result(), waiting[1])


def _write(
    files: list[CheckedFile], template: ChatTemplate, tokenizer: Tokenizer, out: Path, dtype: np.dtype, events: Events
) -> Statistics:
    statistics, done, total = Statistics(), 0, sum(file.rows for file in files)
    events.progress(0, total, "documents")
    with (
        IdxmapWriter(out / names.TOKENS, dtype) as tokens,
        IdxmapWriter(out / names.LOSS_MASK, np.uint8) as loss_mask,
    ):
        for places, batch in _encoded(files, template, tokenizer):
            if batch.lengths.min() == 0:
                place = places[int(batch.lengths.argmin())]
                raise DatasetFormatError(f"{place}: renders to no tokens at all; leave the row out")
            statistics.add(batch)
            tokens.add(batch.ids, batch.lengths)
            loss_mask.add(batch.mask, batch.lengths)
            done += len(batch.lengths)
            events.progress(done, total, "documents")
    return statistics


def _require_sensible_mask(manifest: DatasetManifest, template: str) -> None:
    if 0 < manifest.trained_tokens < manifest.tokens:
        return
    share = "no token" if manifest.trained_tokens == 0 else "every token"
    raise DatasetFormatError(
        f"{share} of the {manifest.documents} documents would be trained with chat template {template!r}: only the "
        "assistant's turns should be; look at the template's {% generation %} blocks and at the roles in the rows"
    )


def _estimated_bytes(files: list[Path], dtype: np.dtype) -> int:
    """Room the idxmaps will take, rather too much: a token for every two bytes of text; parquet is compressed."""
    there = [file for file in files if file.is_file()]
    text = sum(file.stat().st_size * (4 if file.suffix.lower() == ".parquet" else 1) for file in there)
    return text * (dtype.itemsize + 1) // 2
