"""Damaged, malicious and truncated files, full disks and kills: a clear error or a clean rerun, never a wrong model."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bare import bare_model
from safetensors.torch import load_file, save_file
from tiny import write_model

from megatron_ext.errors import CheckpointError, DiskSpaceError, SourceError, UntrustedPickleError
from megatron_ext.events import Events
from megatron_ext.folders import published
from megatron_ext.weights import files
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.torch_dist import TorchDistReader

WEIGHTS = "model.safetensors"
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "checkpoint").mkdir()
    convert(write_model(folder / "hf", num_hidden_layers=2), folder / "checkpoint", dtype=None, events=Events())
    return folder


@pytest.fixture
def place(pristine, tmp_path) -> Path:
    """A folder with hf/, checkpoint/ and an empty out/."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    return tmp_path


def convert_refused(place: Path, error: type[Exception], *fragments: str, **options) -> None:
    with pytest.raises(error) as caught:
        convert(place / "hf", place / "out", **({"dtype": None, "events": Events()} | options))
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list((place / "out").iterdir()) == []


def change_header(path: Path, change) -> None:
    """Rewrite the header of a safetensors file; the tensors' bytes stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def first_two(header: dict) -> list[dict]:
    entries = (entry for name, entry in header.items() if name != "__metadata__")
    return sorted(entries, key=lambda entry: entry["data_offsets"])[:2]


def overlap(header: dict) -> None:
    one, two = first_two(header)
    two["data_offsets"] = one["data_offsets"]


def beyond_the_file(header: dict) -> None:
    last = max((e for n, e in header.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + 4096 for offset in last["data_offsets"]]


def not_the_shape(header: dict) -> None:
    first_two(header)[0]["shape"][0] += 1


def negative(header: dict) -> None:
    first_two(header)[0]["data_offsets"][0] = -8


def name_twice(header: dict) -> str:
    text = json.dumps(header)
    name = json.dumps(next(iter(header)))
    return "{" + name + ": " + json.dumps(header[next(iter(header))]) + ", " + text[1:]


def no_json(header: dict) -> str:
    return json.dumps(header)[:-1]


def a_list(header: dict) -> str:
    return "[]"


@pytest.mark.parametrize(
    "change", [overlap, beyond_the_file, not_the_shape, negative, name_twice, no_json, a_list], ids=lambda c: c.__name__
)
def test_a_safetensors_header_that_contradicts_itself_is_named(change, place):
    change_header(place / "hf" / WEIGHTS, change)
    convert_refused(place, SourceError, WEIGHTS, "truncated or damaged")


@pytest.mark.parametrize("length", [0, 7, 1 << 40, (1 << 64) - 1])
def test_a_safetensors_header_of_impossible_length_is_named(length, place):
    path = place / "hf" / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    convert_refused(place, SourceError, WEIGHTS)


def shard(model: Path) -> dict[str, str]:
    """Split the single file into two shards; gives the index."""
    tensors = load_file(model / WEIGHTS)
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == file}, model / file)
    (model / WEIGHTS).unlink()
    write_index(model, index)
    return index


def write_index(model: Path, index: dict) -> None:
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_an_index_that_names_a_tensor_that_no_file_has_is_refused(place):
    index = shard(place / "hf")
    write_index(place / "hf", index | {"model.layers.9.weight": "model-00001-of-00002.safetensors"})
    convert_refused(place, SourceError, "model.layers.9.weight", "index.json")


def test_a_tensor_in_two_files_is_refused(place):
    index = shard(place / "hf")
    name = min(index)
    first, second = (place / "hf" / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file(load_file(second) | {name: load_file(first)[name]}, second)
    convert_refused(place, SourceError, name, first.name, second.name)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/hostname", "", 7, None])
def test_an_index_that_points_anywhere_else_is_refused(target, place):
    shutil.copy(place / "hf" / WEIGHTS, place / "elsewhere.safetensors")
    write_index(place / "hf", {"model.norm.weight": target})
    convert_refused(place, SourceError, f"{WEIGHTS}.index.json")


def test_a_file_that_is_cut_while_it_is_read_is_named(place):
    path = place / "hf" / WEIGHTS

    source = files.OpenFile(path)
    os.truncate(path, 100)
    with pytest.raises(EOFError, match="100"):
        source.fill(50, torch.empty(100, dtype=torch.uint8))


@pytest.mark.parametrize("broken", ["hf", "checkpoint"])
def test_a_read_error_of_the_disk_names_file_and_tensor(broken, place, monkeypatch):
    descriptors, read = set(), os.preadv
    opened = os.open

    def remember(path, *args, **kwargs):
        descriptor = opened(path, *args, **kwargs)
        if str(path).endswith((WEIGHTS, ".distcp")):
            descriptors.add(descriptor)
        return descriptor

    def fail(descriptor, *args):
        if descriptor in descriptors and args[1] > 50_000:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, *args)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "preadv", fail)
    if broken == "hf":
        convert_refused(place, SourceError, WEIGHTS, "Input/output error", "cannot be read")
        return
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*Input/output error"):
        export(place / "checkpoint", place / "hf", place / "out", dtype=None, events=Events())
    assert list((place / "out").iterdir()) == []


def test_no_flipped_byte_around_a_chunks_numbers_gives_other_numbers(place):
    """Every byte of a chunk's zip that is no number of the tensor: an error that names the file, or the same tensor."""
    release, key = place / "checkpoint" / "release", "decoder.final_layernorm.weight"
    original = TorchDistReader(release)
    expected = original.read(key, (0,), (64,))
    (stored,) = (place for index, place in original._storage.items() if index.fqn == key)
    path = release / stored.relative_path
    content = path.read_bytes()
    first = content.index(expected.numpy().tobytes(), stored.offset)
    numbers = range(first, first + expected.nbytes)
    unread = 0
    for offset in range(stored.offset, stored.offset + stored.length):
        if offset in numbers:
            continue
        put(path, offset, content[offset] ^ 0x21)
        try:
            assert torch.equal(TorchDistReader(release).read(key, (0,), (64,)), expected), offset
        except CheckpointError as error:
            unread += f"{path} is truncated or damaged: {key}" in str(error)
        put(path, offset, content[offset])
    assert unread > stored.length // 2, "nearly all of it is structure that torch would stumble over"


def put(path: Path, offset: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([byte]))


class Command:
    """Runs when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_table_of_tensors_that_would_run_a_command_is_refused_by_name(place, monkeypatch):
    monkeypatch.chdir(place)
    path = place / "checkpoint" / "release" / ".metadata"
    found = pickle.loads(path.read_bytes())
    found.planner_data = {"x": Command()}
    path.write_bytes(pickle.dumps(found))
    with pytest.raises(UntrustedPickleError, match=r"posix\.system"):
        export(place / "checkpoint", place / "hf", place / "out", dtype=None, events=Events())
    assert not (place / "ran").exists()


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_table_of_tensors_is_an_error_or_still_the_same_tensors(seed, place):
    release = place / "checkpoint" / "release"
    path, key = release / ".metadata", "output_layer.weight"
    content, expected = path.read_bytes(), TorchDistReader(release).read(key, (0, 0), (512, 64))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        damaged = bytearray(content)
        for place_of in torch.randint(0, len(content), (3,), generator=generator).tolist():
            damaged[place_of] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
        path.write_bytes(damaged)
        try:
            reader = TorchDistReader(release)
            if reader.shapes.get(key) == (512, 64):
                assert torch.equal(reader.read(key, (0, 0), (512, 64)), expected)
        except (CheckpointError, UntrustedPickleError):
            pass


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 120 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    return bare_model(tmp_path_factory.mktemp("larger") / "hf", layers=1)  # 28 MB


def fill(folder: Path, leave: int) -> None:
    """Use up the disk but for ``leave`` bytes."""
    size = shutil.disk_usage(folder).free - leave
    with (folder / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(larger, small_disk):
    fill(small_disk, leave=10 * MEGABYTE)
    (small_disk / "out").mkdir()
    with pytest.raises(DiskSpaceError, match="needs"):
        convert(larger, small_disk / "out", dtype=None, events=Events())
    assert list((small_disk / "out").iterdir()) == []


class FillsTheDisk(Events):
    """Somebody else's file grows while the weights are written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def progress(self, done: int, total: int | None, unit: str, rate: float | None = None) -> None:
        if not (self._folder / "other").exists():
            fill(self._folder, leave=0)


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_disk_that_fills_up_after_the_weights_leaves_nothing(command, larger, small_disk, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    convert(larger, tmp_path / "checkpoint", dtype=None, events=Events())
    with pytest.raises(DiskSpaceError, match="cannot go on writing"):
        run_published(command, larger, tmp_path / "checkpoint", small_disk, FillsTheDisk(small_disk))
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_disk_that_fills_up_amid_the_weights_leaves_nothing(command, larger, small_disk, tmp_path, monkeypatch):
    """On a file system that cannot reserve room, and reports more than there is, as quotas do."""
    (tmp_path / "checkpoint").mkdir()
    convert(larger, tmp_path / "checkpoint", dtype=None, events=Events())
    fill(small_disk, leave=15 * MEGABYTE)
    monkeypatch.setattr(files, "_reserve", os.ftruncate)
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(DiskSpaceError, match="cannot go on writing"):
        run_published(command, larger, tmp_path / "checkpoint", small_disk, Events())
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def run_published(command: str, model: Path, checkpoint: Path, disk: Path, events: Events) -> None:
    with published(disk / "out", marker=command) as partial:
        if command == "convert":
            convert(model, partial, dtype=None, events=events)
        else:
            export(checkpoint, model, partial, dtype=None, events=events)


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_ext.events import Events
from megatron_ext.folders import published
from megatron_ext.weights import pipeline
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export

class Killed(Events):
    def progress(self, done, total, unit, rate=None):
        if done > total // 3:
            os.kill(os.getpid(), signal.SIGKILL)

pipeline.PROGRESS_SECONDS, pipeline.SYNC_SECONDS = 0, 0.001
command, model, checkpoint, out = sys.argv[1], *map(Path, sys.argv[2:])
with published(out, marker=command) as partial:
    if command == "convert":
        convert(model, partial, dtype=None, events=Killed())
    else:
        export(checkpoint, model, partial, dtype=None, events=Killed())
"""


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_kill_amid_the_weights_publishes_nothing_and_a_rerun_is_whole(command, larger, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    convert(larger, tmp_path / "checkpoint", dtype=None, events=Events())
    arguments = [command, larger, tmp_path / "checkpoint", tmp_path / "out"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "out").exists()
    partial = tmp_path / f".out.{command}.partial"
    assert any(partial.rglob("*.distcp" if command == "convert" else "*.safetensors"))
    if command == "convert":
        with pytest.raises(CheckpointError):
            TorchDistReader(partial / "release")
    run_published(command, larger, tmp_path / "checkpoint", tmp_path, Events())
    if command == "convert":
        assert contents(tmp_path / "out" / "release") == contents(tmp_path / "checkpoint" / "release")
    else:
        assert (tmp_path / "out" / WEIGHTS).stat().st_size == (larger / WEIGHTS).stat().st_size
        back, original = load_file(tmp_path / "out" / WEIGHTS), load_file(larger / WEIGHTS)
        assert all(torch.equal(back[name], original[name]) for name in original)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
