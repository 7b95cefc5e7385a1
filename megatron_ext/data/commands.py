"""``mflow tokenize``. Heavy imports happen inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_ext.config import DatasetFormat
from megatron_ext.errors import ConfigError
from megatron_ext.folders import published
from megatron_ext.options import AsJson, Out, Overwrite, report
from megatron_ext.terminal import TerminalEvents

INPUT = (
    "Files, globs, folders or URLs; 0.7:FILE weighs it in a blend. Each line of a .txt file is a document of its own."
)
Overlong = Literal["truncate", "drop", "split"]


def tokenize(
    input: Annotated[list[str], typer.Option(help=INPUT)],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face folder with the tokenizer.")],
    out: Out,
    format: Annotated[DatasetFormat, typer.Option(help="Shape of a row; auto decides from the rows.")] = "auto",
    chat_template: Annotated[str | None, typer.Option(help="Named template or Jinja file.")] = None,
    columns: Annotated[str | None, typer.Option(help="FIELD=COLUMN,... where files name fields otherwise.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads or processes; default one a core.")] = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End documents with the eos token.")] = False,
    prepend_bos: Annotated[bool, typer.Option("--prepend-bos", help="Start documents with the bos token.")] = False,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of the longest document.")] = None,
    overlong: Annotated[Overlong, typer.Option(help="What becomes of a longer one.")] = "truncate",
    on_bad_row: Annotated[
        Literal["error", "skip"], typer.Option(help="What becomes of a row that does not fit.")
    ] = "error",
    last_turn_only: Annotated[bool, typer.Option("--last-turn-only", help="Train the last answer alone.")] = False,
    train_on_prompt: Annotated[bool, typer.Option("--train-on-prompt", help="Train the prompt, too.")] = False,
    slow_tokenizer: Annotated[bool, typer.Option("--slow-tokenizer", help="Take the Python tokenizer.")] = False,
    extra_vocab_size: Annotated[
        int, typer.Option(min=0, help="Tokens that the tokenizer may have beyond the model's vocab_size.")
    ] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn text, conversations or preferences into idxmaps of tokens and loss masks."""
    from megatron_ext.data.sources import expand
    from megatron_ext.data.tokenization import tokenize as tokenize_files

    sources = expand(input)
    reads = [*(Path(source.path) for source in sources if not source.is_url), tokenizer]
    place = published(out, overwrite=overwrite, marker="tokenize", inputs=reads, resumable=True)
    with place as partial, TerminalEvents() as events:
        summary = tokenize_files(
            sources,
            tokenizer,
            partial,
            events=events,
            workers=workers,
            extra_vocab_size=extra_vocab_size,
            format=format,
            chat_template=chat_template,
            columns=_pairs(columns),
            append_eod=append_eod,
            prepend_bos=prepend_bos,
            max_length=max_length,
            overlong=overlong,
            on_bad_row=on_bad_row,
            last_turn_only=last_turn_only,
            train_on_prompt=train_on_prompt,
            slow_tokenizer=slow_tokenizer,
        )
    report(summary, as_json, out)


def _pairs(text: str | None) -> dict[str, str]:
    """``a=b,c=d`` as a dictionary."""
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair]
    if any(not (name and value) for name, _, value in pairs):
        raise ConfigError(f"--columns {text!r} is not of the form field=column,field=column")
    return {name: value for name, _, value in pairs}
