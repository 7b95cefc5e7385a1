"""Idxmap files against megatron-core's own: the same bytes, and its reader reads ours."""

import numpy as np
import pytest
from chat_data import chat, write_chat_tokenizer
from tiny import write_jsonl

from megatron_ext.data import idxmap
from megatron_ext.data.idxmap import Idxmap, IdxmapWriter
from megatron_ext.data.tokenization import tokenize
from megatron_ext.events import Events


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_files_equal_megatron_cores_byte_for_byte(tmp_path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 200, int(rng.integers(1, 50))) for _ in range(40)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IdxmapWriter(tmp_path / "ours", dtype) as writer:
        for part in (documents[:13], documents[13:]):
            writer.add(np.concatenate(part), np.array([len(d) for d in part]))

    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [read[i].tolist() for i in range(len(read))] == [d.tolist() for d in documents]
    ours = Idxmap(tmp_path / "theirs")
    assert [ours[i].tolist() for i in range(len(ours))] == [d.tolist() for d in documents]


def test_megatron_core_reads_what_tokenize_writes_as_it_is(tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    monkeypatch.setattr(idxmap, "INDEX_PART", 7)  # an index of several parts
    model = write_chat_tokenizer(tmp_path / "model")
    chats = [{"messages": chat("hello " * (n % 5 + 1), f"you are number {n}")} for n in range(40)]
    pairs = [{"prompt": f"{n}?", "chosen": "yes " * (n % 3 + 1), "rejected": "no"} for n in range(40)]
    given = {"chats": ("messages", ["tokens", "loss_mask"], chats)}
    sides = [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("tokens", "loss_mask")]
    given["pairs"] = ("preference", sides, pairs)
    for name, (format, parts, rows) in given.items():
        out = tmp_path / name
        options = {"format": format, "chat_template": "chatml"}
        tokenize([write_jsonl(tmp_path / f"{name}.jsonl", rows)], model, out, events=Events(), **options)
        for part in parts:
            theirs, ours = IndexedDataset(str(out / part)), Idxmap(out / part)
            assert len(theirs) == len(ours) == 40
            assert [theirs[n].tolist() for n in range(40)] == [ours[n].tolist() for n in range(40)]
            assert theirs.document_indices.tolist() == list(range(41))
            assert theirs[0].dtype == (np.uint8 if "mask" in part else np.uint16)
