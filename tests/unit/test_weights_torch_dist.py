"""The streaming torch_dist writer and reader, alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare import bare_model, bare_weight

from megatron_ext.errors import CheckpointError
from megatron_ext.families.base import Architecture
from megatron_ext.weights.torch_dist import TorchDistReader, TorchDistWriter

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
    writer = TorchDistWriter(folder, architecture())
    for layer in range(len(value)):
        weight = bare_weight("weight", tuple(value.shape), (layer,))
        for start in range(0, value.shape[1], rows):
            writer.write(weight, start, value[layer, start : start + rows])
    writer.close()
    return folder


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_any_region_reads_back_from_any_chunks(rows, tmp_path):
    value = torch.randn(10, 6, 5)
    reader = TorchDistReader(write(tmp_path / "c", value, rows))
    assert reader.shapes == {"weight": (10, 6, 5)}
    for start, shape in [
        ((0, 0, 0), (10, 6, 5)),
        ((4, 0, 0), (1, 6, 5)),
        ((2, 1, 3), (5, 4, 2)),
        ((9, 5, 4), (1, 1, 1)),
    ]:
        box = tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))
        assert torch.equal(reader.read("weight", start, shape), value[box])


def test_writer_stores_only_the_rows_that_it_was_given(tmp_path):
    value = torch.zeros(1000, 1000)
    writer = TorchDistWriter(tmp_path / "c", architecture())
    writer.write(bare_weight("weight", (1, 1000)), 0, value[:1])
    writer.close()
    assert (tmp_path / "c" / "__0_0.distcp").stat().st_size < 20_000


def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path):
    writer = TorchDistWriter(tmp_path / "c", architecture())
    writer.write(bare_weight("weight", (4, 2)), 0, torch.ones(2, 2))
    writer.close()
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
