"""Data files to a tokenized dataset: idxmaps of token ids and loss masks, and the manifest that says what they are.

The rows are read once, in blocks, by workers of which any number gives the same bytes. What is finished is kept while
the build goes on, so a killed one is taken up where it was. Which engine encodes is decided here; see ``engine_proof``.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config import TokenizeOptions
from megatron_ext.config_files import validated
from megatron_ext.data import manifest as names
from megatron_ext.data.building import Start, build, require_exact
from megatron_ext.data.chat_templates import special_tokens
from megatron_ext.data.counts import Counts
from megatron_ext.data.engine_proof import ONE_IN, EngineDiffersError, Proof, prove
from megatron_ext.data.engines import GIGATOKEN, PYTHON, TOKENIZERS, engine_version, refusal
from megatron_ext.data.manifest import (
    SIDES,
    DatasetManifest,
    EngineRecord,
    LeftOut,
    LengthStatistics,
    Side,
    SourceFile,
    TemplateRecord,
    TokenHistogram,
)
from megatron_ext.data.pipeline import available_cores
from megatron_ext.data.plan import Plan, make_plan
from megatron_ext.data.shards import Shards, clear, left_start
from megatron_ext.data.source_facts import SourceFacts
from megatron_ext.data.sources import Source
from megatron_ext.data.tokenizers import tokenizer_file
from megatron_ext.errors import DatasetFormatError, RowFormatError, SourceError, UserError, WorkerFailedError
from megatron_ext.events import Events
from megatron_ext.folders import full_disk_named
from megatron_ext.worker import Job

if TYPE_CHECKING:
    from megatron_ext.data.rendering import ChatTemplate


def run(job: Job, events: Events) -> dict[str, Any]:
    """The worker's entry: inputs ``files`` and ``tokenizer``, config the fields of ``TokenizeOptions``.

    ``extra_vocab_size`` in the config is as for ``tokenize``; ``sources`` holds ``[weight, input]`` of each file, where
    a recipe gave weights.
    """
    options = dict(job.config)
    given, files = options.pop("sources", None), job.inputs["files"]
    if given:
        entries = list(dict.fromkeys(said for _, said in given))
        known = zip(files, given, strict=True)
        files = [Source(path, weight, said, entries.index(said)) for path, (weight, said) in known]
    folder = Path(job.inputs["tokenizer"])
    return tokenize(files, folder, job.out, workers=job.runtime.workers, events=events, **options)


def tokenize(
    files: Sequence[str | Path | Source],
    tokenizer: Path,
    out: Path,
    *,
    events: Events,
    workers: int | None = None,
    extra_vocab_size: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Tokenize data files into the dataset folder ``out``; the bytes depend on the input and the options alone.

    Args:
        files: files, globs, folders or URLs, each with an optional weight in front, in the order in which their rows
            are written.
        tokenizer: Hugging Face folder with the tokenizer, and config.json if the vocabulary is to be checked.
        out: folder to write; what a killed attempt at the same left there is gone on with, anything else is cleared.
        workers: threads, or processes for many conversations; None takes one for each core.
        extra_vocab_size: tokens that the tokenizer may have beyond the model's vocabulary.
        options: fields of ``config.TokenizeOptions``.

    Returns:
        Counts, the format and the rate.

    Raises:
        SourceError: a file or the tokenizer is missing or unreadable.
        DatasetFormatError: a row does not fit; names file, row and field. Or no token, or every token, is trained.
        ChatTemplateError: the template is unknown, missing, or refuses a row.
        VocabularyError: the tokenizer does not fit the model of its folder.
        ConfigError: options that do not go together.
        DiskSpaceError: too little room for the result.
    """
    started = time.monotonic()
    checked = validated(TokenizeOptions, options, "the options of tokenize")
    try:
        plan = make_plan(files, tokenizer, out, checked, extra_vocab_size)
        _tell(plan, events)
        manifest = _build(plan, out, workers or available_cores(), events)
    except RowFormatError as error:
        raise DatasetFormatError(str(error)) from None  # which another process can make again of its message
    for loss in manifest.losses():
        events.note(loss)
    seconds = time.monotonic() - started
    kept = manifest.model_dump(
        include={"kind", "documents", "tokens", "trained_tokens", "untrained_documents", "row_format", "why", "dtype"}
    )
    left_out = manifest.left_out.model_dump(exclude={"first_skipped"})
    return {
        **kept,
        **left_out,
        "chat_template": None if plan.template is None else plan.template.name,
        "engine": manifest.engine.name if manifest.engine else None,
        "seconds": round(seconds, 3),
        "documents_per_second": round(manifest.documents / seconds, 1),
        "tokens_per_second": round(manifest.tokens / seconds),
    }


def remarks(template: ChatTemplate, tokenizer: Any) -> list[str]:
    """What a person should know about this template with this tokenizer, before hours of training show it."""
    notes, name = [], f"chat template {template.name!r}"
    if template.writes_date:
        notes.append(f"{name} writes today's date into samples; a dataset made another day differs")
    if not template.probed:
        return notes
    if template.drops_system:
        notes.append(
            f"{name} leaves out the system message of a conversation that ends with an answer; rows lose theirs"
        )
    if not template.end_marker:
        notes.append(f"{name} writes no end marker after an answer; the model will not learn to stop")
        return notes
    if not template.trains_end_marker:
        notes.append(f"{name} leaves the end marker out of its {{% generation %}}; the model will not learn to stop")
    pieces = len(tokenizer.encode(template.end_marker.strip(), add_special_tokens=False).ids)
    if pieces > 1:
        notes.append(f"the end marker {template.end_marker.strip()!r} of {name} is {pieces} tokens in this tokenizer")
    return notes


def _tell(plan: Plan, events: Events) -> None:
    for why in dict.fromkeys(plan.whys):
        events.note(why)
    if plan.kind == "text" and (named := plan.options.chat_template):
        events.note(f"chat template {named!r} is not used in tokenizing: text is trained as it is")
    if plan.template is not None:
        from megatron_ext.data.rendering import ChatTemplate

        for note in remarks(ChatTemplate(plan.template, special_tokens(plan.folder)), plan.reference.tokenizer):
            events.note(note)


def _build(plan: Plan, out: Path, workers: int, events: Events) -> DatasetManifest:
    left = left_start(out, plan.identity)
    start = Start(**left) if left else _start(plan)
    facts = SourceFacts(plan.sources, plan.states)
    proof = _proven_meanwhile(plan) if start.engine == GIGATOKEN else Future()
    try:
        try:
            return _attempt(plan, out, start, proof, facts, workers, events)
        except EngineDiffersError as error:
            why = f"gigatoken is not exact here: {error}"
            events.note(f"{why}; tokenizers does the work, which takes longer")
            return _attempt(plan, out, replace(start, engine=TOKENIZERS, why=why), proof, facts, workers, events)
    finally:
        facts.stop()


def _proven_meanwhile(plan: Plan) -> Future[Proof]:
    """The outcome of the stress set, found beside the work in a thread that nobody waits for when the work ends."""
    proof: Future[Proof] = Future()
    definition = plan.definition
    assert definition is not None

    def find() -> None:
        try:
            proof.set_result(prove(definition, plan.reference))
        except BaseException as error:  # noqa: BLE001 (the future raises it)
            proof.set_exception(error)

    threading.Thread(target=find, name="proof", daemon=True).start()
    return proof


def _start(plan: Plan) -> Start:
    """Which engine is tried, and why it is not the fast one."""
    moment = datetime.now().isoformat()
    if plan.definition is None:
        return Start(PYTHON, "slow_tokenizer was asked for", moment)
    if plan.is_small:
        return Start(TOKENIZERS, "there is too little data for another engine", moment)
    if reason := refusal(plan.definition):
        return Start(TOKENIZERS, f"gigatoken is not used: {reason}", moment)
    return Start(GIGATOKEN, "", moment)


def _attempt(
    plan: Plan,
    out: Path,
    start: Start,
    proof: Future[Proof],
    facts: SourceFacts,
    workers: int,
    events: Events,
) -> DatasetManifest:
    (out / names.NAME).unlink(missing_ok=True)
    skipping = plan.options.on_bad_row == "skip"
    head = (plan.identity, asdict(start), plan.kind, plan.dtype, plan.id_limit)
    with _kept_if_any(Shards(out, *head, skipping=skipping)) as shards:
        build(plan, shards, start, proof, facts, workers, events)
        require_exact(start.engine, proof)
        _require_sound(plan, shards, facts)
        record = _engine_record(start, proof, shards.total)
        manifest = _manifest(plan, shards, facts, record)
        shards.finish()
        shutil.copyfile(tokenizer_file(plan.folder), out / names.TOKENIZER)
        manifest.write(out)
    clear(out, keep_result=True)
    return manifest


@contextmanager
def _kept_if_any(shards: Shards) -> Iterator[Shards]:
    """``shards``, opened. An error says what it leaves to the next attempt, and leaves nothing else."""
    try:
        with full_disk_named(shards.out), shards:
            yield shards
    except (UserError, WorkerFailedError) as error:
        if not shards.total.rows:
            clear(shards.out)
            raise
        kept = f"the first {shards.total.rows:,} rows are tokenized and kept; the same command goes on behind them"
        error.args = (f"{error} ({kept})",)
        raise


def _require_sound(plan: Plan, shards: Shards, facts: SourceFacts) -> None:
    """Refuse, shards and all, what another attempt would make no better."""
    changed = facts.changed()
    try:
        if changed:
            raise SourceError(f"{changed[0]} changed while it was read; run this again when it is written")
        _require_sensible(plan, shards.total)
    except UserError:
        shards.discard()
        raise


def _engine_record(start: Start, proof: Future[Proof], total: Counts) -> EngineRecord:
    version = engine_version(start.engine)
    if start.engine != GIGATOKEN:
        return EngineRecord(name=start.engine, version=version, why=start.why)
    texts = proof.result().texts
    return EngineRecord(
        name=start.engine,
        version=version,
        why=f"the same ids as tokenizers on {texts:,} stress texts (every character of Unicode outside uniform blocks, "
        f"every token of the vocabulary) and on {total.compared_documents:,} documents of this data: its start, and "
        f"one in {ONE_IN}; the other documents were not compared",
        stress_texts=texts,
        compared_documents=total.compared_documents,
        compared_bytes=total.compared_bytes,
        reference_documents=total.reference_documents,
    )


def _manifest(plan: Plan, shards: Shards, facts: SourceFacts, engine: EngineRecord) -> DatasetManifest:
    total = shards.total
    sides = {}
    if len(SIDES[plan.kind]) > 1:
        for number, side in enumerate(SIDES[plan.kind]):
            sides[side.rstrip("_")] = Side(
                tokens=sum(int(part.sum(dtype="int64")) for part in shards.lengths(side)),
                trained_tokens=total.trained[number],
                untrained_documents=total.untrained[number],
                lengths=LengthStatistics.of(shards.lengths(side)),
            )
    vocabulary = {number: token for token, number in plan.vocabulary.items()}
    return DatasetManifest(
        kind=plan.kind,
        documents=total.documents,
        tokens=total.tokens,
        trained_tokens=total.tokens if plan.kind == "text" else sum(total.trained),
        untrained_documents=sum(total.untrained),
        vocab_size=len(plan.vocabulary),
        max_token_id=int(shards.frequencies.nonzero()[0][-1]),
        tokenizer_digest=plan.tokenizer_digest,
        chat_template=plan.template and TemplateRecord(name=plan.template.name, digest=plan.template.digest),
        row_format=", ".join(sorted(set(plan.formats))),
        why="; ".join(dict.fromkeys(plan.whys)),
        dtype=plan.dtype.name,
        lengths=LengthStatistics.of(part for side in SIDES[plan.kind] for part in shards.lengths(side)),
        files=tuple(_file(plan, shards, facts, number) for number in range(len(plan.sources))),
        sides=sides,
        options=plan.options,
        eod_id=plan.finish.eod,
        bos_id=plan.finish.bos,
        left_out=LeftOut(
            skipped_rows=total.skipped,
            first_skipped=tuple(total.named),
            empty_rows=total.empty,
            dropped=total.dropped,
            truncated=total.truncated,
            truncated_tokens=total.truncated_tokens,
            answers_cut_off=total.answers_cut_off,
            split=total.split,
        ),
        histogram=TokenHistogram.of(shards.frequencies, vocabulary),
        engine=engine,
    )


def _file(plan: Plan, shards: Shards, facts: SourceFacts, number: int) -> SourceFile:
    source, counts = plan.sources[number], shards.by_source.get(number, Counts())
    return SourceFile(
        name=source.name,
        rows=counts.rows,
        digest=facts.digest(number),
        format=plan.formats[number],
        weight=source.weight,
        entry=source.entry,
        input=Path(source.input).name if source.input in ("", source.path) else source.input,
        documents=counts.documents,
    )


def _require_sensible(plan: Plan, total: Counts) -> None:
    """Refuse a dataset without documents, and a loss mask that is all ones or all zeros."""
    if not total.documents:
        left_out = f"{total.rows:,} rows: {total.skipped:,} skipped, {total.empty:,} empty, {total.dropped:,} too long"
        if total.answers_cut_off:
            left_out += f", {total.answers_cut_off:,} whose answer was beyond max_length {plan.options.max_length}"
        named = f"; the first: {total.named[0]}" if total.named else ""
        raise DatasetFormatError(f"no document is left of {left_out}{named}")
    if plan.kind == "text" or plan.template is None:
        return
    trained = sum(total.trained)
    if trained == 0 or (trained == total.tokens and not plan.options.train_on_prompt):
        share = "no token" if trained == 0 else "every token"
        raise DatasetFormatError(
            f"{share} of the {total.documents} documents would be trained with chat template {plan.template.name!r}: "
            "only the assistant's turns should be; look at the template's {% generation %} blocks and at the roles in "
            "the rows"
        )
