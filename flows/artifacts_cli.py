"""`mflow artifacts list|show|verify|prune`: what the store holds. Without Prefect."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from tasks.store import Store

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="What the store holds.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Name = Annotated[str, typer.Argument(help="Beginning of a fingerprint, or kind/fingerprint.")]


@app.command("list")
def list_artifacts(as_json: AsJson = False) -> None:
    """Every artifact, oldest first."""
    store = Store.current()
    every = store.artifacts()
    if as_json:
        keep = {"stage", "kind", "fingerprint", "created", "seconds"}
        places = {m.fingerprint: {"size": m.size, "folder": str(store.folder(m.kind, m.fingerprint))} for m in every}
        typer.echo(json.dumps([{**m.model_dump(include=keep), **places[m.fingerprint]} for m in every]))
        return
    for m in every:
        typer.echo(f"{m.created[:19]}  {m.kind + '/' + m.fingerprint:<46} {m.size / 1e6:>10.1f} MB {m.seconds:>8.1f} s")
    leftovers = store.leftovers()
    if leftovers:
        typer.echo(f"{len(leftovers)} folders of logs, unfinished or damaged builds: mflow artifacts prune")


@app.command()
def show(name: Name) -> None:
    """The manifest of one artifact, and where it lies."""
    store = Store.current()
    manifest = store.find(name)
    typer.echo(str(store.folder(manifest.kind, manifest.fingerprint)))
    typer.echo(manifest.model_dump_json(indent=1))


@app.command()
def verify(name: Annotated[str | None, typer.Argument(help="One artifact; without it all.")] = None) -> None:
    """Read every byte and compare it with what was written; exit code 1 when something differs."""
    store = Store.current()
    every = [store.find(name)] if name else store.artifacts()
    damaged = 0
    for manifest in every:
        faults = store.faults(manifest, full=True)
        damaged += bool(faults)
        typer.echo(f"{'damaged' if faults else 'ok':<8} {manifest.kind}/{manifest.fingerprint}")
        for fault in faults:
            sys.stderr.write(f"  {fault}\n")
    typer.echo(f"{len(every) - damaged} of {len(every)} artifacts are as they were written")
    if damaged:
        sys.stderr.write("a run that needs a damaged artifact builds it again\n")
        raise typer.Exit(1)


@app.command()
def prune(
    name: Annotated[list[str] | None, typer.Argument(help="Artifacts to remove, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove logs, damaged folders and unfinished builds (what a stopped training saved, too), and named artifacts."""
    store, done = Store.current(), "would remove" if dry_run else "removed"
    chosen = [store.find(one) for one in name or []]
    with store.writing():
        for path in store.leftovers():
            if dry_run or store.discard(path):
                typer.echo(f"{done}  {path}")
        for manifest in chosen:
            if not dry_run:
                store.remove(manifest)
            typer.echo(f"{done}  {store.folder(manifest.kind, manifest.fingerprint)}")
