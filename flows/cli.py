"""The flows' commands of `mflow`: run, explain, deploy, up, artifacts. Prefect is imported by those that need it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from flows.artifacts_cli import app as artifacts

__all__ = ["artifacts", "deploy", "explain", "run", "up"]

FlowName = Annotated[str, typer.Argument(metavar="FLOW", help="full-pretrain, full-sft, full-dpo or upcycle-sft.")]
Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="For instance deployments/recipes/demo_sft.yaml.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override: train.lr=1e-5.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def run(flow: FlowName, recipe: Recipe, set: Overrides = None, as_json: AsJson = False) -> None:
    """Run a flow with a recipe, here and now; stages that were done before are reused."""
    from flows.running import run_recipe

    raise typer.Exit(run_recipe(flow, recipe, set or [], as_json))


def explain(flow: FlowName, recipe: Recipe, set: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a run would reuse and what it would build, and why."""
    from flows.explaining import explain_recipe

    typer.echo(explain_recipe(flow, recipe, set or [], as_json))


def deploy() -> None:
    """Put work pools, deployments and automations onto the Prefect server."""
    from flows.server import QUIET, running_server
    from megatron_ext.errors import ConfigError

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    url = running_server()
    if url is None:
        named = os.environ.get("PREFECT_API_URL")
        where = f"at {named} (PREFECT_API_URL)" if named else "that mflow knows of"
        raise ConfigError(f"no Prefect server answers {where}; start one with: mflow up   or set PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = url
    from flows.deploying import deploy_all

    for line in deploy_all():
        typer.echo(line)
    typer.echo("start one with: prefect deployment run full-sft")


def up(
    port: Annotated[int, typer.Option(help="Port for a new server, if it is free.")] = 4200,
    check: Annotated[bool, typer.Option("--check", help="Only see that a server starts, and end.")] = False,
) -> None:
    """Serve Prefect's UI, the deployments and a worker on pool local until Ctrl-C."""
    from flows import up as serving

    if check:
        serving.check(typer.echo)
    else:
        serving.up(port, typer.echo)
