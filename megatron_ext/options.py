"""Options that several commands share, and how a command reports. Light: nothing heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option(help="Folder to write; absent, empty, or this command's own partial.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]
ModelFolder = Annotated[Path, typer.Option(help="Hugging Face model folder.")]


def report(summary: dict[str, Any], as_json: bool, out: Path) -> None:
    """Print the summary, or where the result is."""
    if as_json:
        typer.echo(json.dumps({"out": str(out.absolute()), **summary}))
    else:
        typer.echo(f"{out.absolute()}")
