"""Files of torch.save that are laid out before their tensors are known."""

import io
from pathlib import Path

import pytest
import torch

from megatron_ext.weights.torch_zip import Announced, ZipLayout, lay_out


def contents(layout: ZipLayout, tensors: dict[Announced, torch.Tensor]) -> bytes:
    content = bytearray(layout.size)
    pieces = [*layout.pieces, *((layout.places[a], bytes(t.view(-1).view(torch.uint8))) for a, t in tensors.items())]
    for offset, piece in pieces:
        content[offset : offset + len(piece)] = piece
    return bytes(content)


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def is_what_torch_saves(layout: ZipLayout, value) -> bool:
    theirs = saved(value)
    return layout.size == len(theirs) and layout.is_laid_out_in([theirs[o : o + len(p)] for o, p in layout.pieces])


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(3, 4), torch.randn(2, 3, 5).bfloat16(), torch.randn(7).half(), torch.tensor(3), torch.empty(0, 4)],
    ids=lambda t: f"{t.dtype} {list(t.shape)}",
)
def test_a_tensor_is_laid_out_byte_for_byte_as_torch_saves_it(tensor):
    announced = Announced(tensor.dtype, tuple(tensor.shape))
    assert is_what_torch_saves(lay_out(announced), tensor)


def test_a_nested_dict_with_settings_and_shared_tensors_is_laid_out_as_torch_saves_it():
    a, b = torch.randn(3, 4).bfloat16(), torch.arange(5)
    first = Announced(a.dtype, (3, 4))
    value = {"model": {"a": a, "again": a, "b": b}, "iteration": 7, "args": {"lr": 1e-3, "names": ["x", None]}}
    announced = {**value, "model": {"a": first, "again": first, "b": b}}
    layout = lay_out(announced)
    assert is_what_torch_saves(layout, value)
    assert not is_what_torch_saves(layout, {**value, "iteration": 8})
    loaded = torch.load(io.BytesIO(contents(layout, {first: a})), weights_only=True)
    assert torch.equal(loaded["model"]["a"], a)
    assert torch.equal(loaded["model"]["b"], b)
    assert loaded["model"]["a"].data_ptr() == loaded["model"]["again"].data_ptr()
    assert loaded["args"] == value["args"]


def test_records_beyond_4_gb_lie_where_torch_puts_them(tmp_path):
    """Sparse files: torch's own has its tensors left out, which is what ``skip_data`` does."""
    huge = torch.from_file(str(tmp_path / "sparse"), shared=True, size=5 << 30, dtype=torch.uint8)
    small = torch.ones(3)
    path = tmp_path / "model.pt"
    with torch.serialization.skip_data():
        torch.save({"huge": huge, "small": small}, path)
    announced = {"huge": Announced(torch.uint8, (5 << 30,)), "small": Announced(torch.float32, (3,))}
    layout = lay_out(announced, "model")
    assert layout.size == path.stat().st_size
    with path.open("r+b") as file:
        theirs = [(file.seek(offset), file.read(len(piece)))[1] for offset, piece in layout.pieces]
        assert layout.is_laid_out_in(theirs)
        for offset, piece in layout.pieces:
            file.seek(offset)
            file.write(piece)
        file.seek(layout.places[announced["small"]])
        file.write(bytes(small.view(torch.uint8).numpy()))
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["huge"].shape == (5 << 30,)
    assert torch.equal(loaded["small"], small)


def test_torch_maps_the_file_and_finds_every_tensor_aligned(tmp_path: Path):
    tensors = {f"t{i}": torch.randn(3 + 10 * i) for i in range(20)}
    announced = {name: Announced(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    layout = lay_out(announced, "model")
    assert all(place % 64 == 0 for place in layout.places.values())
    path = tmp_path / "model.pt"
    path.write_bytes(contents(layout, {announced[name]: t for name, t in tensors.items()}))
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
