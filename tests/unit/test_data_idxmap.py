"""Idxmap files: what was written is read back, damage is named, unfit documents are refused."""

import numpy as np
import pytest

from megatron_ext.data.idxmap import Idxmap, IdxmapWriter, token_dtype
from megatron_ext.errors import DatasetFormatError, SourceError, VocabularyError


def written(folder, dtype=np.uint16):
    with IdxmapWriter(folder / "tokens", dtype) as writer:
        writer.add(np.arange(7), np.array([3, 4]))
        writer.add(np.arange(10, 15), np.array([5]))
    return folder / "tokens"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_what_was_written_is_read_back(tmp_path, dtype):
    data = Idxmap(written(tmp_path, dtype))
    assert [d.tolist() for d in (data[0], data[1], data[2], data[-1])] == [
        [0, 1, 2], [3, 4, 5, 6], [10, 11, 12, 13, 14], [10, 11, 12, 13, 14],
    ]  # fmt: skip
    assert data.lengths.tolist() == [3, 4, 5]
    assert data.starts.tolist() == [0, 3, 7]
    assert data.document_bounds.tolist() == [0, 1, 2, 3]
    assert (len(data), data.dtype, data.values.size) == (3, np.dtype(dtype), 12)


def test_type_follows_the_vocabulary():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def write(prefix, *batches):
    with IdxmapWriter(prefix, np.uint16) as writer:
        for values, lengths in batches:
            writer.add(np.asarray(values), np.asarray(lengths))


def test_an_empty_document_is_refused(tmp_path):
    with pytest.raises(DatasetFormatError, match=r"document 3 of .*tokens is empty"):
        write(tmp_path / "tokens", (range(4), [2, 2]), (range(4), [4, 0]))
    assert not (tmp_path / "tokens.idx").exists()


@pytest.mark.parametrize("value", [70_000, -100])
def test_an_id_beyond_the_type_is_refused(tmp_path, value):
    with pytest.raises(VocabularyError, match=f"id {value} does not fit uint16"):
        write(tmp_path / "tokens", ([1, value], [2]))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file_is_named(tmp_path, suffix):
    prefix = written(tmp_path)
    path = tmp_path / f"tokens{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=rf"tokens\{suffix} is truncated"):
        Idxmap(prefix)


def test_a_missing_file_and_a_foreign_file_are_named(tmp_path):
    with pytest.raises(SourceError, match=r"tokens.idx does not exist"):
        Idxmap(tmp_path / "tokens")
    prefix = written(tmp_path)
    (tmp_path / "tokens.idx").write_bytes(b"x" * 100)
    with pytest.raises(SourceError, match="not the index of an idxmap"):
        Idxmap(prefix)
