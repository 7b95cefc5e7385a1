"""Blocks of conversations and preferences: parsed, rendered, encoded and masked, in processes where there is much.

Rows are read in one process and rendered in others; each holds its own template, tokenizer and engine.
"""

from __future__ import annotations

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
from megatron_ext.data.documents import Batch, Finish
from megatron_ext.data.encoding import MaskMaker, encode_by_reference
from megatron_ext.data.engine_proof import Comparison
from megatron_ext.data.engines import GIGATOKEN, GigatokenEngine, ReferenceEngine, Texts
from megatron_ext.data.formats import Conversation, Preference, parse_row, wanted_columns
from megatron_ext.data.rendering import ChatTemplate, Rendered
from megatron_ext.data.sources import Source, read_rows
from megatron_ext.data.text_work import Done, Skipped
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ChatTemplateError, DatasetFormatError, RowFormatError

BLOCK_ROWS = 256
SHARD_BLOCKS = 64


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
        for row, value in read_rows(source, wanted_columns(format, columns), start, skipped.on_bad):
            held.append((row, value))
            if len(held) == BLOCK_ROWS:
                yield ChatBlock(number, str(source), format, row, held, skipped.take(), first=first)
                held, first = [], False
        yield ChatBlock(number, str(source), format, row, held, skipped.take(), True, first)


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
        tokenizer = load_tokenizer(self.tokenizer, slow=self.options.slow_tokenizer)
        return ChatWorker(self, ReferenceEngine(tokenizer))


class ChatWorker:
    """Turns blocks of rows into documents with masks; used by one thread at a time."""

    def __init__(self, spec: ChatSpec, reference: ReferenceEngine) -> None:
        self._spec, self._reference = spec, reference
        self._template = spec.chat_template()
        self._takes_tools: bool | None = None
        self._engine: GigatokenEngine | None = None
        if spec.engine == GIGATOKEN:
            self._engine = GigatokenEngine(reference.tokenizer.to_str(), reference)  # type: ignore[union-attr]
            self._masks = MaskMaker(self._engine, reference)

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
                documents.append(self._rendered(row, block, number))
                numbers.append(number)
            except (RowFormatError, ChatTemplateError, DatasetFormatError) as error:
                self._bad(error, counts)
        if not documents:
            return Done(block.source, block.row, block.ends_source, counts=counts)
        rows = np.array(numbers, dtype=np.int64)
        sides = [self._encoded(list(side), rows, block, counts) for side in zip(*documents, strict=True)]
        sides = self._filled(sides, rows, block, counts)
        sides, cuts = self._spec.finish.apply(sides, text=False)
        counts.add(cuts)
        return Done(block.source, block.row, block.ends_source, sides, counts)

    def _rendered(self, row: Any, block: ChatBlock, number: int) -> tuple[Rendered, ...]:
        parsed = parse_row(row, block.format, block.place, number, self._spec.options.columns)
        place = f"{block.place}, row {number}"
        if not isinstance(parsed, Conversation | Preference):
            raise DatasetFormatError(f"{place}: is text, not a conversation")
        if parsed.uses_tools:
            if self._takes_tools is None:
                self._takes_tools = self._template.takes_tools()
            if not self._takes_tools:
                raise DatasetFormatError(
                    f"{place}: has tools, tool calls or tool answers, but chat template {self._template.name!r} "
                    "has no place for them; name one that has (qwen2.5), or leave such rows out"
                )
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

    def _encoded(self, documents: list[Rendered], rows: np.ndarray, block: ChatBlock, counts: Counts) -> Batch:
        if self._engine is None:
            return encode_by_reference(self._reference, documents)
        texts = Texts.of_strings(document.text for document in documents)
        before = self._engine.reference_documents
        ids = self._engine.encode(texts)
        counts.reference_documents += self._engine.reference_documents - before
        comparison = Comparison(self._reference)
        comparison.check(texts, ids, rows, block.place, first=block.first)
        counts.compared_documents += comparison.documents
        counts.compared_bytes += comparison.bytes
        return Batch(ids.values, self._masks.mask(documents, texts, ids), ids.lengths)

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
