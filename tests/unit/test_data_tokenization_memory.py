"""Memory while conversations are tokenized: bounded in bytes, not in rows."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
from chat_data import chat, write_chat_tokenizer
from pyarrow import parquet

from megatron_ext.data import chat_work
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.sources import as_source

ROOT = Path(__file__).parents[2]
LONG = "the capital of France is Paris. " * 8000  # 256 kB
LARGE = """
import resource, sys
from pathlib import Path
from megatron_ext.data import plan, tokenization
from megatron_ext.events import Events
plan.SMALL_BYTES = 0
options = {"chat_template": "chatml", "workers": 1, "events": Events()}
tokenization.tokenize([sys.argv[1]], Path(sys.argv[3]), Path(sys.argv[4]) / "start", **options)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenization.tokenize([sys.argv[2]], Path(sys.argv[3]), Path(sys.argv[4]) / "large", **options)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def write(path, rows):
    """Rows of 256 kB without ever holding them all."""
    if path.suffix == ".parquet":
        with parquet.ParquetWriter(path, pyarrow.Table.from_pylist(rows[:1]).schema) as writer:
            for at in range(0, len(rows), 64):
                writer.write_table(pyarrow.Table.from_pylist(rows[at : at + 64]))
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            for row in rows:
                file.write(json.dumps(row).encode() + b"\n")
    return path


CHAT = {"messages": chat("question", LONG)}
PAIR = {"prompt": "question", "chosen": LONG, "rejected": LONG + "No."}


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize(("row", "name"), [(CHAT, "a.jsonl.zst"), (PAIR, "a.jsonl.zst"), (CHAT, "a.parquet")])
def test_long_conversations_take_no_more_memory_than_short_ones(row, name, tmp_path, model):
    start, large = write(tmp_path / f"start-{name}", [row] * 4), write(tmp_path / name, [row] * 256)
    result = subprocess.run(
        [sys.executable, "-c", LARGE, start, large, model, tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert DatasetManifest.read(tmp_path / "out/large").documents == 256
    assert int(result.stdout) < 200 << 20, f"{int(result.stdout) >> 20} MB more than for 4 rows"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_a_block_ends_where_its_content_is_large(name, tmp_path):
    path = write(tmp_path / name, [CHAT] * 30 + [{"messages": chat("q", "a")}] * 400 + [CHAT] * 3)
    blocks = list(chat_work.chat_blocks([as_source(path)], ["messages"], {}, (0, 0), skip=False))
    sizes = [sum(chat_work.content_size(value) for _, value in block.rows) for block in blocks]
    assert max(sizes) < chat_work.BLOCK_BYTES + 2 * len(LONG)
    assert max(len(block.rows) for block in blocks) == chat_work.BLOCK_ROWS
    rows = [number for block in blocks for number, _ in block.rows]
    assert rows == list(range(1, 434))
    assert all(before < after for before, after in pairwise(block.row for block in blocks[:-1]))


@pytest.mark.parametrize("value", [CHAT, PAIR, "abc", None, 3, [], {"a": [{"b": ["c" * 50] * 9}]}])
def test_the_size_of_a_row_is_about_that_of_its_json(value):
    assert abs(chat_work.content_size(value) - len(json.dumps(value))) < 200
