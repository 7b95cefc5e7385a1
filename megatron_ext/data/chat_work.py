"""Blocks of conversations and preferences: parsed, rendered, encoded and masked, in processes where there is much.

Rows are read in one process and rendered in others; each holds its own template, tokenizer and engine.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.config import TokenizeOptions
from megatron_ext.data.chat_templates import TemplateSource
from megatron_ext.data.counts import Counts
from megatron_ext.data.definition import Definition
from megatron_ext.data.documents import Batch, Finish
from megatron_ext.data.encoding import MaskMaker, encode_by_reference
from megatron_ext.data.engine_proof import FIRST_BYTES, Comparison
from megatron_ext.data.engines import GIGATOKEN, GigatokenEngine, ReferenceEngine, Texts
from megatron_ext.data.formats import Conversation, Preference, parse_row, wanted_columns
from megatron_ext.data.rendering import ChatTemplate, Rendered
from megatron_ext.data.sources import Source, read_rows
from megatron_ext.data.text_work import Done, Skipped
from megatron_ext.data.tokenizers import load_tokenizer, tokenizer_file
from megatron_ext.errors import ChatTemplateError, DatasetFormatError, RowFormatError

BLOCK_ROWS, BLOCK_BYTES = 256, 2 << 20
"""A block ends at whichever comes first; the second is about the content, see ``content_size``."""
SHARD_BLOCKS = 64
TURNS_IN_CELLS = ("prompt_completion", "preference")
"""Formats with fields that hold a text or turns; a csv file can only hold these as JSON."""


@dataclass
class ChatBlock:
    """Rows of one file, and what was skipped among them; without rows at the end of a file."""

    source: int
    place: str
    format: str
    row: int
    rows: list[tuple[int, Any]]
    skipped: Counts
    ends_source: bool = False
    first: bool = False


def chat_blocks(
    sources: list[Source],
    formats: list[str],
    columns: Mapping[str, str],
    position: tuple[int, int],
    *,
    skip: bool,
) -> Iterator[ChatBlock]:
    """The blocks of all files, from behind ``position`` (source, row)."""
    for number, (source, format) in enumerate(zip(sources, formats, strict=True)):
        if number < position[0]:
            continue
        start = position[1] if number == position[0] else 0
        skipped, row, held, first = Skipped(skip), start, [], number == 0 and start == 0
        size = 0
        for row, value in read_rows(source, wanted_columns(format, columns), start, skipped.on_bad):
            if source.kind == ".csv" and format in TURNS_IN_CELLS:
                value = {name: _turns_of(cell) for name, cell in value.items()}
            held.append((row, value))
            size += content_size(value)
            if len(held) == BLOCK_ROWS or size >= BLOCK_BYTES:
                yield ChatBlock(number, str(source), format, row, held, skipped.take(), first=first)
                held, first, size = [], False, 0
        yield ChatBlock(number, str(source), format, max(row, skipped.row), held, skipped.take(), True, first)


def _turns_of(cell: Any) -> Any:
    """The turns of which a cell holds the JSON text, or the cell."""
    if not (isinstance(cell, str) and cell.lstrip().startswith("[")):
        return cell
    try:
        turns = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return turns if turns and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns) else cell


def content_size(value: Any) -> int:
    """Characters of all text in a row's value, and a few for everything else: about its size as JSON."""
    size, waiting = 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, dict):
            size += 8 * len(part)
            waiting.extend(part.values())
        elif isinstance(part, list):
            size += 8 * len(part)
            waiting.extend(part)
    return size


@dataclass(frozen=True)
class ChatSpec:
    """What a worker needs to make its template, tokenizer and engine; travels to other processes."""

    tokenizer: Path
    template: TemplateSource
    special_tokens: dict[str, str]
    options: TokenizeOptions
    finish: Finish
    engine: str
    now: datetime

    def chat_template(self) -> ChatTemplate:
        """The compiled template."""
        return ChatTemplate(
            self.template,
            self.special_tokens,
            last_turn_only=self.options.last_turn_only,
            train_on_prompt=self.options.train_on_prompt,
            now=self.now,
        )

    def worker(self) -> ChatWorker:
        """A worker for this process."""
        reference = ReferenceEngine(load_tokenizer(self.tokenizer, slow=self.options.slow_tokenizer))
        definition = Definition.read(tokenizer_file(self.tokenizer)) if self.engine == GIGATOKEN else None
        return ChatWorker(self, ChatEncoder(reference, definition))


class ChatEncoder:
    """Rendered documents to ids and masks; threads may share it. Without ``definition`` the reference does the work."""

    def __init__(self, reference: ReferenceEngine, definition: Definition | None) -> None:
        self._reference = reference
        self._engine: GigatokenEngine | None = None
        if definition is not None:
            self._engine = GigatokenEngine(definition, reference)
            self._masks = MaskMaker(self._engine, reference)

    def encode(self, documents: list[Rendered], rows: np.ndarray, block: ChatBlock, counts: Counts) -> Batch:
        """The documents of these rows of a block; what was compared is counted.

        Raises:
            EngineDiffersError: the fast engine is not exact on this data.
        """
        if self._engine is None:
            return encode_by_reference(self._reference, documents)
        texts = Texts.of_strings(document.text for document in documents)
        ids = self._engine.encode(texts)
        counts.reference_documents += ids.from_reference
        comparison = Comparison.of(texts, ids, rows, block.place, first=FIRST_BYTES if block.first else 0)
        comparison.require_equal(self._reference)
        counts.compared_documents += comparison.texts.count
        counts.compared_bytes += int(comparison.texts.bounds[-1])
        return Batch(ids.values, self._masks.mask(documents, texts, ids), ids.lengths)


class ChatWorker:
    """Turns blocks of rows into documents with masks; used by one thread at a time."""

    def __init__(self, spec: ChatSpec, encoder: ChatEncoder) -> None:
        self._spec, self._encoder = spec, encoder
        self._template = spec.chat_template()

    def work(self, block: ChatBlock) -> Done:
        """The documents of a block: one side of a conversation, two of a preference.

        Raises:
            DatasetFormatError, ChatTemplateError: a row does not fit (unless such rows are skipped); names it.
            EngineDiffersError: the fast engine is not exact on this data.
        """
        counts = block.skipped
        counts.rows += len(block.rows)
        numbers: list[int] = []
        documents: list[tuple[Rendered, ...]] = []
        for number, row in block.rows:
            try:
                if rendered := self._rendered(row, block, number):
                    documents.append(rendered)
                    numbers.append(number)
                else:
                    counts.empty += 1
            except (RowFormatError, ChatTemplateError, DatasetFormatError) as error:
                self._bad(error, counts)
        if not documents:
            return Done(block.source, block.row, block.ends_source, counts=counts)
        rows = np.array(numbers, dtype=np.int64)
        sides = [self._encoder.encode(list(side), rows, block, counts) for side in zip(*documents, strict=True)]
        sides = self._filled(sides, rows, block, counts)
        sides, cuts = self._spec.finish.apply(sides, text=False)
        counts.add(cuts)
        return Done(block.source, block.row, block.ends_source, sides, counts)

    def _rendered(self, row: Any, block: ChatBlock, number: int) -> tuple[Rendered, ...]:
        """One side or two; nothing where nothing would be trained but the template's own words."""
        parsed = parse_row(row, block.format, block.place, number, self._spec.options.columns)
        place = f"{block.place}, row {number}"
        if not isinstance(parsed, Conversation | Preference):
            raise DatasetFormatError(f"{place}: is text, not a conversation")
        if parsed.uses_tools and (lacking := self._template.tool_use.lacks(parsed)):
            no_place = f"chat template {self._template.name!r} has no place for them"
            raise DatasetFormatError(
                f"{place}: has {lacking}, but {self._template.tool_use.refusal or no_place}; name a template that has "
                "a place for them (qwen2.5), or leave such rows out"
            )
        if self._template.is_empty(parsed):
            return ()
        try:
            documents: tuple[Rendered, ...]
            if isinstance(parsed, Preference):
                documents = self._template.render_pair(parsed)
            else:
                documents = (self._template.render(parsed),)
            for document in documents:
                document.text.encode()
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{place}: {error}") from None
        except UnicodeEncodeError:
            raise DatasetFormatError(
                f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            ) from None
        return documents

    def _bad(self, error: Exception, counts: Counts) -> None:
        if self._spec.options.on_bad_row == "error":
            # an error with a signature of its own would not come back from another process
            raise DatasetFormatError(str(error)) if isinstance(error, RowFormatError) else error
        counts.add(Counts(skipped=1, named=[str(error)]))

    def _filled(self, sides: list[Batch], rows: np.ndarray, block: ChatBlock, counts: Counts) -> list[Batch]:
        """The documents that have tokens on every side; one without is a bad row."""
        filled = np.logical_and.reduce([side.lengths > 0 for side in sides])
        for number in rows[~filled].tolist():
            place = f"{block.place}, row {number}"
            self._bad(DatasetFormatError(f"{place}: renders to no tokens at all; leave the row out"), counts)
        return [side.select(filled) for side in sides]


# --- in a process of its own ------------------------------------------------------------------------------------

_workers: list[ChatWorker] = []


def start_process(spec: ChatSpec, owner: int) -> None:
    """Make this process a worker that ends when ``owner`` does."""
    from megatron_ext.guard import OwnerGuard

    OwnerGuard([owner], 0).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers.append(spec.worker())


def work_in_process(block: ChatBlock) -> Done:
    """What ``ChatWorker.work`` gives, with arrays that travel well."""
    done = _workers[0].work(block)
    return replace(done, sides=[Batch(np.ascontiguousarray(s.ids), s.mask, s.lengths) for s in done.sides])
