"""demo://NAME: base model, training data and held-out benchmark made from a seed: a recipe without downloads.

``demo://routing`` is a support desk: a customer writes, the model answers with the department that takes over.
The same seed gives the same bytes: nothing depends on hash seeds, thread counts or the network.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.demo import routing
from megatron_ext.errors import ConfigError, unknown

if TYPE_CHECKING:
    from megatron_ext.events import Events
    from megatron_ext.worker import Job

DEMOS = {"routing": routing}
DATA = {"data": "conversations", "text": "plain text", "preferences": "pairs of answers"}
"""Folder of training rows -> what they are. As data, demo://NAME names the first, demo://NAME/text the second."""


def generate(name: str, seed: int, out: Path) -> dict[str, Any]:
    """Write ``out/model`` (HF folder), ``train.jsonl`` in each folder of ``DATA``, ``out/tasks`` (YAML, held-out rows).

    Raises:
        ConfigError: no demo of that name.
    """
    if name not in DEMOS:
        raise ConfigError(unknown("demo", name, DEMOS, "add one in megatron_ext/demo/"))
    from megatron_ext.demo.model import write_model, write_tokenizer

    demo = DEMOS[name]
    for part in ("model", *DATA, "tasks"):
        shutil.rmtree(out / part, ignore_errors=True)
        (out / part).mkdir(parents=True)
    train, heldout = demo.rows(seed)
    _write_jsonl(out / "data" / "train.jsonl", [demo.conversation(row) for row in train])
    _write_jsonl(out / "text" / "train.jsonl", [demo.document(row) for row in train])
    pairs = [demo.preference(row, number) for number, row in enumerate(train[: demo.PAIRS])]
    _write_jsonl(out / "preferences" / "train.jsonl", pairs)
    _write_jsonl(out / "tasks" / "heldout.jsonl", heldout)
    (out / "tasks" / demo.TASK_FILE).write_text(demo.TASK, encoding="utf-8")
    write_tokenizer(out / "model", demo.corpus(train))
    parameters = write_model(out / "model", seed)
    return {
        "name": name,
        "seed": seed,
        "train_rows": len(train),
        "heldout_rows": len(heldout),
        "model_parameters": parameters,
        "model": str(out / "model"),
        "files": [str(out / "data" / "train.jsonl")],
        "include_path": str(out / "tasks"),
    }


def run(job: Job, events: Events) -> dict[str, Any]:
    """The ``demo`` job: config ``{"name": "routing", "seed": 1}``."""
    summary = generate(str(job.config.get("name", "routing")), int(job.config.get("seed", 1)), job.out)
    events.note(f"made {summary['train_rows']} conversations and a model of {summary['model_parameters']:,} parameters")
    return {k: summary[k] for k in ("name", "seed", "train_rows", "heldout_rows", "model_parameters")}


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
