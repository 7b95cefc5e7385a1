"""Data files of every kind, compressed or not, and what is read of them."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
from pyarrow import ipc, parquet

TEXTS = ["plain", "日本 é, \u2028 👩‍👩‍👧", ' says "hi", \\ twice ', "x" * 5000, "last"]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def packed(path, compression):
    """The file compressed beside itself."""
    raw = path.read_bytes()
    if compression == ".gz":
        return write(path.with_name(path.name + ".gz"), gzip.compress(raw))
    return write(path.with_name(path.name + ".zst"), pyarrow.compress(raw, "zstd", asbytes=True))


def write_texts(folder: Path, name: str, texts: list[str]) -> Path:
    """A file of any kind that holds the texts and, where the kind has fields, another one."""
    path, table = folder / name, pyarrow.table({"id": range(len(texts)), "text": texts})
    match path.suffix:
        case ".json":
            path.write_text(json.dumps([{"id": n, "text": t} for n, t in enumerate(texts)], ensure_ascii=False))
        case ".jsonl":
            path.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts)))
        case ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
        case ".txt":
            path.write_bytes("\n".join(texts).encode())
        case ".arrow":
            with pyarrow.OSFile(str(path), "wb") as sink, ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return path


def texts_of(batches):
    return [(batch.row(i), text) for batch in batches for i, text in enumerate(batch.values.to_pylist())]
