"""`mflow`: the engine's commands. Heavy imports happen inside the command that needs them.

Commands of the other rooms (run, explain, deploy, up, artifacts) register in the entry-point group
``megatron_flows.commands`` and are loaded when they are named, so the engine works where Prefect is not installed.
Exit codes: 0 done; 1 crash, or two models that must be the same are not; 2 the input was at fault. One line on standard
error says how.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from megatron_ext.config import EvalConfig, TrainJobConfig
from megatron_ext.config_files import read_yaml, validated, with_overrides
from megatron_ext.data.commands import tokenize
from megatron_ext.errors import MegatronFlowsError, OutputExistsError, SourceError, UserError
from megatron_ext.folders import published
from megatron_ext.options import AsJson, ModelFolder, Overwrite
from megatron_ext.terminal import TerminalEvents
from megatron_ext.weights.commands import convert, export, verify

COMMANDS = "megatron_flows.commands"
UsageError = typer.BadParameter.__base__
"""A wrong option or value; typer carries its own click, which has no public name."""


class VariadicCommand(TyperCommand):
    """A command whose repeatable options also take several values at once: ``--input a.json b.json``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        spread: list[str] = []
        flag = None
        for arg in args:
            if arg.startswith("-"):
                flag = arg if arg in repeatable else None
            elif flag and spread[-1] != flag:
                spread.append(flag)
            spread.append(arg)
        return super().parse_args(ctx, spread)


class Commands(TyperGroup):
    """The engine's commands and those that other rooms registered."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted({*super().list_commands(ctx), *entry_points(group=COMMANDS).names})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (command := super().get_command(ctx, cmd_name)) is not None:
            return command
        for entry in entry_points(group=COMMANDS, name=cmd_name):
            loaded = entry.load()
            if isinstance(loaded, typer.Typer):
                return typer.main.get_command(loaded)
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name)(loaded)
            return typer.main.get_command(single)
        return None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Convert, tokenize, train, export and evaluate language models with Megatron-Core.",
)

for command in (convert, export, verify):
    app.command()(command)
app.command(cls=VariadicCommand)(tokenize)

DatasetPlace = Annotated[
    Path, typer.Argument(help="Folder that mflow tokenize wrote, or the prefix of a Megatron-LM pair.")
]


@app.command()
def inspect(
    dataset: DatasetPlace,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
    html: Annotated[Path | None, typer.Option(help="HTML file to write, complete in itself.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Hugging Face folder to decode with; by default the dataset's own tokenizer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what will be trained: totals, lengths, and samples with the trained tokens coloured."""
    from rich.console import Console

    from megatron_ext.data.inspection import inspect_dataset, render_terminal
    from megatron_ext.data.inspection_views import render_document

    inspection = inspect_dataset(dataset, samples, tokenizer)
    if html:
        try:
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(render_document(inspection), encoding="utf-8")
        except OSError as error:
            raise SourceError(f"cannot write {html}: {error.strerror}; name another file with --html") from None
    if as_json:
        typer.echo(json.dumps(inspection.as_json()))
    elif html:
        typer.echo(f"{html.absolute()}")
    else:
        render_terminal(inspection, Console(soft_wrap=True))


@app.command()
def pack(
    dataset: DatasetPlace,
    seq_length: Annotated[int, typer.Option(min=8, help="Tokens in one packed sequence.")],
    pack_alignment: Annotated[int, typer.Option(min=1, help="Tokens that each sample takes a multiple of.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="As train.seed.")] = 1234,
    overlong: Annotated[Literal["truncate", "drop"], typer.Option(help="What happens to longer samples.")] = "truncate",
    as_json: AsJson = False,
) -> None:
    """Say how a dataset packs at a sequence length; what training at the same settings will use is kept."""
    from megatron_ext.data.selection import Choice, packing_figures

    asked = {"seq_length": seq_length, "pack_alignment": pack_alignment, "seed": seed, "overlong": overlong}
    figures = packing_figures(dataset, validated(Choice, asked, "the command line"))
    if as_json:
        typer.echo(json.dumps(figures))
        return
    width = max(map(len, figures))
    for name, value in figures.items():
        typer.echo(
            f"{name.replace('_', ' '):<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}"
        )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with model, data, train, runtime and out.")],
    set: Annotated[list[str] | None, typer.Option(help="Override, for instance train.lr=1e-5.")] = None,
) -> None:
    """Fine-tune a checkpoint; a rerun goes on from the last checkpoint. Works under any torchrun, too."""
    from megatron_ext.platforms.base import select
    from megatron_ext.training.setup import prepare
    from megatron_ext.worker import TERMINAL, Job

    values = validated(TrainJobConfig, with_overrides(read_yaml(config), set or []), str(config))
    out = values.out.absolute()
    _require_training_folder(out)
    checkpoint = values.model.checkpoint
    given = {"checkpoint": checkpoint, "state": None if values.model.finetune else checkpoint, **dict(values.data)}
    job = Job(
        job="train",
        config=values.train.model_dump(),
        inputs={name: str(path.absolute()) for name, path in given.items() if path is not None},
        out=out,
        events=out / "events.jsonl",
        runtime=values.runtime,
    )
    prepare(job)  # what is refused leaves nothing behind, and a training that is there as it was
    if values.runtime.platform != "auto":
        select(values.runtime.platform)
    out.mkdir(parents=True, exist_ok=True)
    job_file = out / "job.json"
    draft = out / f".job.{os.getpid()}.json"
    draft.write_text(job.model_dump_json(indent=1), encoding="utf-8")
    draft.replace(job_file)
    sys.stdout.flush()
    os.environ[TERMINAL] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "megatron_ext.worker", str(job_file)])


def _require_training_folder(out: Path) -> None:
    """Refuse a folder with something in it that no ``mflow train`` put there."""
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"out {out} is a file; choose a folder")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = {"job.json", "training_state.json"} & held or all(name.startswith(".job.") for name in held)
    if held and not ours:
        raise OutputExistsError(f"out {out} is not empty, and holds no training; choose another folder")


@app.command(cls=VariadicCommand)
def evaluate(
    model: ModelFolder,
    tasks: Annotated[list[str], typer.Option(help="lm-eval task names.")],
    include_path: Annotated[Path | None, typer.Option(help="Folder with task YAMLs of your own.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Hugging Face folder to compare with.")] = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = True,
    chat_template: Annotated[str | None, typer.Option(help="Named template or Jinja file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents scored at once.")] = 16,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json and samples.jsonl.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Score a Hugging Face model with lm-eval, beside a baseline if one is given."""
    from megatron_ext.evaluation.compare import comparison_table
    from megatron_ext.evaluation.lm_eval_runner import evaluate as score

    asked = {"tasks": tasks, "num_fewshot": num_fewshot, "limit": limit, "chat_template": chat_template}
    config = validated(EvalConfig, {**asked, "apply_chat_template": apply_chat_template}, "the command line")

    def scores(folder: Path, into: Path) -> dict[str, Any]:
        into.mkdir(parents=True, exist_ok=True)
        return score(folder, into, config, include_path=include_path, batch_size=batch_size, events=events)

    with tempfile.TemporaryDirectory() as scratch, TerminalEvents() as events:
        base = scores(baseline, Path(scratch) / "base") if baseline else None
        if out is None:
            tuned = scores(model, Path(scratch) / "model")
        else:
            reads = [path for path in (model, baseline, include_path) if path]
            with published(out, overwrite=overwrite, marker="evaluate", inputs=reads) as partial:
                tuned = scores(model, partial)
    if as_json:
        typer.echo(json.dumps({"model": tuned, **({"baseline": base} if base else {})}))
    else:
        typer.echo(comparison_table(tuned, base))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, what is missing, and what to do about it."""
    from megatron_ext.doctor import diagnose

    findings = diagnose()
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in findings]))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f"  -> {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{finding.state:<8} {finding.name:<{width}}  {finding.detail}{remedy}")


def _usage_sentence(error: Any) -> str:
    said, command = error.format_message(), error.ctx.command_path if error.ctx else "mflow"
    if said.startswith("Usage:"):  # no arguments at all: the help itself
        return said
    return f"error: {said.replace('Value error, ', '').rstrip('.')}; see {command} --help"


def main() -> None:
    """Entry point of the `mflow` script."""
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        sys.stderr.write(_usage_sentence(error) + "\n")
        sys.exit(UserError.exit_code)
    except typer.Abort:
        sys.exit(1)
    except MegatronFlowsError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except PermissionError as error:
        sys.stderr.write(f"error: {error.filename or 'a file'}: {error.strerror}; check who may read and write it\n")
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
