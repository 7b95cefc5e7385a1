"""``mflow convert``, ``mflow export`` and ``mflow verify``. Heavy imports happen inside the command that needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megatron_ext.config import Dtype, VerifyLevel, VocabInit
from megatron_ext.errors import ConfigError, UserError
from megatron_ext.folders import published, size_in_bytes
from megatron_ext.options import AsJson, ModelFolder, Out, Overwrite, report
from megatron_ext.terminal import TerminalEvents
from megatron_ext.weights.manifest import at_iteration

Verify = Annotated[
    VerifyLevel,
    typer.Option(help="What the result must pass: every tensor compared (digest), and all logits (logits)."),
]
Iteration = Annotated[
    int | None, typer.Option(min=0, help="Take this iteration of the checkpoint, not the newest (runtime.keep_every).")
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Load pickled files whatever they want, although they could run any program."),
]


def convert(
    model: ModelFolder,
    out: Out,
    dtype: Dtype | None = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Take the weights of this Megatron checkpoint (torch_dist, or Megatron-LM's mp_rank folders), and of "
            "--model only config and tokenizer: imports a checkpoint, or lays a trained one out anew."
        ),
    ] = None,
    layout: Annotated[
        Literal["torch_dist", "mp_rank"],
        typer.Option(help="torch_dist loads at any parallel sizes; mp_rank is Megatron-LM's file for each rank."),
    ] = "torch_dist",
    tp: Annotated[
        int | None, typer.Option(min=1, help="With --layout mp_rank: tensor-parallel ranks; default 1.")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="With --layout mp_rank: pipeline-parallel ranks; default 1.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option(min=1, help="With --layout mp_rank: expert-parallel ranks; default 1.")
    ] = None,
    make_vocab_size_divisible_by: Annotated[
        int | None,
        typer.Option(min=1, help="With --layout mp_rank: pad the vocabulary to a multiple of this x tp; default 128."),
    ] = None,
    transformer_impl: Annotated[
        Literal["transformer_engine", "local"] | None,
        typer.Option(help="With --layout mp_rank: whose layers' names; default transformer_engine."),
    ] = None,
    moe_grouped_gemm: Annotated[
        bool, typer.Option("--moe-grouped-gemm", help="With --layout mp_rank: name experts as --moe-grouped-gemm does.")
    ] = False,
    extra_vocab_size: Annotated[int, typer.Option(min=0, help="Rows to add for tokens that were added.")] = 0,
    extra_vocab_init: Annotated[VocabInit, typer.Option(help="How those rows start.")] = "mean",
    upcycle: Annotated[
        str | None, typer.Option(help="Make experts of a dense model: num_experts=8,topk=2[,router_init_std=0.02,…].")
    ] = None,
    verify: Verify = "digest",
    trust_pickle: TrustPickle = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a Hugging Face model into a Megatron checkpoint, or a Megatron checkpoint into another layout."""
    from megatron_ext.weights.convert import convert as convert_weights
    from megatron_ext.weights.megatron_writer import asked_layout
    from megatron_ext.weights.relayout import relayout
    from megatron_ext.weights.upcycle import parse_upcycle

    changes: dict[str, Any] = {
        "extra_vocab_size": extra_vocab_size,
        "extra_vocab_init": extra_vocab_init,
        "upcycle": parse_upcycle(upcycle) if upcycle else None,
    }
    if checkpoint and (extra_vocab_size or upcycle):
        raise ConfigError(
            "--extra-vocab-size and --upcycle change a Hugging Face model; leave out --checkpoint, or them"
        )
    sizes = {"tp": tp, "pp": pp, "ep": ep, "make_vocab_size_divisible_by": make_vocab_size_divisible_by}
    naming = {"transformer_impl": transformer_impl, "moe_grouped_gemm": moe_grouped_gemm or None}
    asked: dict[str, Any] = {"dtype": dtype, "verify": verify, "layout": asked_layout(layout, **sizes, **naming)}
    reads = [model, *([checkpoint] if checkpoint else [])]
    with published(out, overwrite=overwrite, marker="convert", inputs=reads) as partial, TerminalEvents() as events:
        if checkpoint:
            summary = relayout(checkpoint, model, partial, events=events, trust_pickle=trust_pickle, **asked)
        else:
            summary = convert_weights(model, partial, events=events, trust_pickle=trust_pickle, **asked, **changes)
    report(summary, as_json, out)


def export(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Folder that mflow convert or mflow train wrote, or that holds Megatron-LM's mp_rank folders."
        ),
    ],
    model: Annotated[Path, typer.Option(help="Hugging Face folder the checkpoint came from: config and tokenizer.")],
    out: Out,
    iteration: Iteration = None,
    dtype: Dtype | None = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a file: 5GB, 500MB, 2GiB, or a number.")] = "5GB",
    verify: Verify = "digest",
    trust_pickle: TrustPickle = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a Megatron checkpoint back into a Hugging Face model."""
    from megatron_ext.weights.export import export as export_weights

    asked = {"dtype": dtype, "verify": verify, "trust_pickle": trust_pickle}
    checkpoint = at_iteration(checkpoint, iteration)
    reads, most = [checkpoint, model], size_in_bytes(max_shard_size, "--max-shard-size")
    with published(out, overwrite=overwrite, marker="export", inputs=reads) as partial, TerminalEvents() as events:
        summary = export_weights(checkpoint, model, partial, events=events, max_shard_size=most, **asked)
    report(summary, as_json, out)


def verify(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    model: Annotated[Path, typer.Option(help="Hugging Face folder that it was converted from, or exported to.")],
    iteration: Iteration = None,
    level: Annotated[Literal["digest", "logits"], typer.Option(help="Every tensor, or the logits of both, too.")] = (
        "digest"
    ),
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Check that a checkpoint and a Hugging Face folder hold the same model.

    Exit code 0 if they do, 1 if they differ, 2 if they cannot be compared.
    """
    from megatron_ext.weights.certificate import facts
    from megatron_ext.weights.verify import verify as verify_weights

    with TerminalEvents() as events:
        try:
            certificate = verify_weights(
                at_iteration(checkpoint, iteration), model, level=level, events=events, trust_pickle=trust_pickle
            )
        except UserError as error:
            if as_json:
                typer.echo(json.dumps({"verified": False, "reason": str(error)}))
            raise
    if as_json:
        typer.echo(json.dumps({"verified": True, **certificate.model_dump()}))
        return
    told = facts(certificate)
    width = max(map(len, told))
    typer.echo("verified: both hold the same model")
    for name, value in told.items():
        typer.echo(f"  {name:<{width}}  {value}")
