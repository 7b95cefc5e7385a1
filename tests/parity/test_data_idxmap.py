"""Idxmap files against megatron-core's own: the same bytes, and its reader reads ours."""

import numpy as np
import pytest

from megatron_ext.data.idxmap import Idxmap, IdxmapWriter


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
