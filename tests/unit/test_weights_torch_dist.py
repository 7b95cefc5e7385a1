"""The streaming torch_dist writer and reader, alone."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from bare import bare_model, bare_weight
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_ext.errors import CheckpointError
from megatron_ext.families.base import Architecture
from megatron_ext.weights import torch_dist
from megatron_ext.weights.torch_dist import FORMAT, TorchDistReader, TorchDistWriter

PEAK = """
import json, sys, threading, time
from pathlib import Path
from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024

def peak_of(function, *folders):
    Path(folders[-1]).mkdir()
    before, samples, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            samples.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function(*map(Path, folders), dtype=None, events=Events())
    done.set()
    watcher.join()
    return max(samples)

peaks = {}
for model in sys.argv[1:]:
    peaks["convert " + model] = peak_of(convert, model, model + "-mcore")
    peaks["export " + model] = peak_of(export, model + "-mcore", model, model + "-back")
print(json.dumps(peaks))
"""


def architecture(layers: int = 1) -> Architecture:
    sizes = dict.fromkeys(("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"), 4)
    return Architecture(
        num_layers=layers, kv_channels=1, vocab_size=8, max_position_embeddings=8, layernorm_epsilon=1e-6, **sizes
    )


def write(folder: Path, value: torch.Tensor, rows: int) -> Path:
    """A checkpoint of one tensor, stacked by its first axis, in chunks of ``rows`` rows."""
    plan = [bare_weight("weight", tuple(value.shape), (layer,)) for layer in range(len(value))]
    writer = TorchDistWriter(folder, plan, {"weight": value.dtype}, architecture())
    for layer, weight in enumerate(plan):
        for start in range(0, value.shape[1], rows):
            writer.write(weight, start, value[layer, start : start + rows])
    writer.close()
    return folder


def save_by_hand(folder: Path, value: torch.Tensor, boxes: list[tuple[slice, ...]], save=torch.save) -> Path:
    """A checkpoint of one tensor in any chunks, each written by ``save``, as another program might write it."""
    folder.mkdir()
    entry, storage = TensorStorageMetadata(TensorProperties(value.dtype), value.shape, []), {}
    with (folder / "__3_1.distcp").open("wb") as file:
        for box in boxes:
            start, place = file.tell(), torch.Size(part.start for part in box)
            save(value[box].clone(), file)
            entry.chunks.append(ChunkStorageMetadata(place, value[box].shape))
            storage[MetadataIndex("weight", place)] = _StorageInfo("__3_1.distcp", start, file.tell() - start)
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"weight": entry}, storage_data=storage)))
    return folder


def without_new_records(value: torch.Tensor, file: BinaryIO) -> None:
    """As torch before 2.1 saved: no byte order."""
    with torch.serialization._open_zipfile_writer(file) as archive:
        torch.serialization._save(value, archive, pickle, 2, True)


REGIONS = [((0, 0, 0), (10, 6, 5)), ((4, 0, 0), (1, 6, 5)), ((2, 1, 3), (5, 4, 2)), ((9, 5, 4), (1, 1, 1))]


def assert_regions(reader: TorchDistReader, value: torch.Tensor) -> None:
    for start, shape in REGIONS:
        box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        assert torch.equal(reader.read("weight", start, shape), value[box])


@pytest.mark.parametrize("chunk_bytes", [1, 48, 1 << 20])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_any_region_reads_back_from_any_pieces_and_chunks(rows, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(torch_dist, "MAX_FILE_BYTES", 20_000)
    value = torch.randn(10, 6, 5)
    reader = TorchDistReader(write(tmp_path / "c", value, rows))
    assert reader.shapes == {"weight": (10, 6, 5)}
    assert_regions(reader, value)


@pytest.mark.parametrize("save", [torch.save, without_new_records])
def test_chunks_that_are_cut_along_any_axis_are_read_as_torch_saved_them(save, tmp_path):
    value = torch.randn(10, 6, 5)
    cuts = [[slice(0, 3), slice(3, 10)], [slice(0, 6)], [slice(0, 2), slice(2, 5)]]
    reader = TorchDistReader(save_by_hand(tmp_path / "c", value, list(itertools.product(*cuts)), save))
    assert_regions(reader, value)
    assert bool(reader._loaded) == (save is not torch.save), "read piece by piece where that is possible"


def test_rows_may_come_in_any_order(tmp_path):
    value = torch.randn(1, 6, 5)
    weight = bare_weight("weight", (1, 6, 5), (0,))
    writer = TorchDistWriter(tmp_path / "c", [weight], {"weight": value.dtype}, architecture())
    for start in (4, 0, 2):
        writer.write(weight, start, value[0, start : start + 2])
    writer.close()
    assert torch.equal(TorchDistReader(tmp_path / "c").rows(weight, 0, 6), value[0])


def test_a_checkpoint_whose_rows_did_not_all_come_is_a_crash_and_no_checkpoint(tmp_path):
    weight = bare_weight("weight", (4, 2))
    writer = TorchDistWriter(tmp_path / "c", [weight], {"weight": torch.float32}, architecture())
    writer.write(weight, 0, torch.ones(2, 2))
    with pytest.raises(ValueError, match="weight"):
        writer.close()
    with pytest.raises(CheckpointError, match="metadata"):
        TorchDistReader(tmp_path / "c")


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    save_by_hand(tmp_path / "c", torch.ones(4, 2), [(slice(0, 2), slice(0, 2))])
    with pytest.raises(CheckpointError, match="only a part of weight"):
        TorchDistReader(tmp_path / "c").read("weight", (0, 0), (4, 2))


def test_the_reader_of_torch_itself_reads_what_was_written(tmp_path):
    import torch.distributed.checkpoint as dcp

    value = torch.randn(2, 7, 3)
    write(tmp_path / "c", value, rows=2)
    loaded = {"weight": torch.zeros(2, 7, 3)}
    dcp.load(loaded, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(loaded["weight"], value)


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_blob_is_an_error_that_names_file_and_key(seed, tmp_path):
    path = write(tmp_path / "c", torch.randn(1, 4, 100), rows=4) / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    start = 2 * seed  # the last ones keep the zip magic
    content[start : start + 900] = bytes(torch.randint(0, 256, (900,), generator=generator).tolist())
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp.*weight"):
        TorchDistReader(tmp_path / "c").read("weight", (0, 0, 0), (1, 4, 100))


def test_memory_does_not_grow_with_the_layers(tmp_path):
    models = [str(bare_model(tmp_path / f"hf{layers}", layers)) for layers in (2, 10)]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *models], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    peaks = json.loads(run.stdout)
    for command in ("convert", "export"):
        few, many = (peaks[f"{command} {model}"] for model in models)
        assert many < few + 15, peaks  # MB; the eight more layers hold 96
        assert many < 80, peaks
