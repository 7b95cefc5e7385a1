"""The gate: what was written must equal its source bit for bit, whatever the types; a difference is named and fatal."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from conversions import (
    DOWN_PROJECTION,
    OUT_PROJECTION,
    WEIGHTS,
    architecture,
    converted,
    damage,
    exported,
    verified,
    write_pristine,
)
from safetensors.torch import load_file, save_file
from tiny import write_model

import megatron_ext.families.llama as llama
from megatron_ext.config import UpcycleConfig
from megatron_ext.errors import (
    CheckpointChangedError,
    CheckpointError,
    VerificationError,
    VocabularyError,
    WeightMappingError,
)
from megatron_ext.weights import convert as converting
from megatron_ext.weights import export as exporting
from megatron_ext.weights.certificate import CERTIFICATE, read_certificate
from megatron_ext.weights.manifest import read_manifest, write_manifest
from megatron_ext.weights.rules import Move
from megatron_ext.weights.verify_digest import require_every_row, same_bits


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_pristine(tmp_path_factory.mktemp("pristine"))


def test_a_pass_leaves_a_certificate_with_the_digest_of_every_tensor(pristine):
    certificate = read_certificate(pristine / "checkpoint")
    tensors = load_file(pristine / "hf" / WEIGHTS)
    assert certificate.level == "digest"
    assert certificate.digests.keys() == tensors.keys()
    assert certificate.bytes == sum(tensor.nbytes for tensor in tensors.values())
    header = f"F32 {list(tensors[OUT_PROJECTION].shape)} ".encode()
    own = xxhash.xxh3_128(header + tensors[OUT_PROJECTION].numpy().tobytes()).hexdigest()
    assert certificate.digests[OUT_PROJECTION] == own


def test_an_export_has_a_certificate_of_its_own(pristine, tmp_path):
    first = exported(pristine / "checkpoint", pristine / "hf", tmp_path / "first")
    mine = json.loads((first / CERTIFICATE).read_text())
    assert mine["digests"] == json.loads((pristine / "checkpoint" / CERTIFICATE).read_text())["digests"]
    again = exported(pristine / "checkpoint", first, tmp_path / "again", verify="none")
    assert not (again / CERTIFICATE).exists()  # the first one's says nothing about these files


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_weights_that_change_their_type_are_compared_in_the_new_one(source, dtype, tmp_path):
    model = write_model(tmp_path / "hf", dtype=source, num_hidden_layers=1)
    checkpoint = converted(model, tmp_path / "checkpoint", dtype=dtype)
    assert read_certificate(checkpoint).dtype == (dtype or {"float32": "fp32", "bfloat16": "bf16"}[source])
    out = exported(checkpoint, model, tmp_path / "out", dtype="bf16")
    assert read_certificate(out).dtype == "bf16"
    assert verified(checkpoint, model).tensors == verified(checkpoint, out).tensors


@pytest.mark.parametrize(
    ("name", "row", "column", "fragments"),
    [
        (OUT_PROJECTION, 3, 5, ["row 3, column 5", "self_attention.linear_proj.weight, layer 1, row 3"]),
        (DOWN_PROJECTION, 63, 0, ["row 63, column 0", "mlp.linear_fc2.weight, layer 0, row 63"]),
        ("model.layers.1.self_attn.k_proj.weight", 9, 1, ["row 9", "linear_qkv.weight, layer 1, row 81"]),
        ("model.layers.0.mlp.up_proj.weight", 2, 7, ["row 2, column 7", "linear_fc1.weight, layer 0, row 162"]),
        ("model.embed_tokens.weight", 511, 63, ["row 511, column 63", "embedding.word_embeddings.weight, row 511"]),
    ],
)
def test_one_flipped_bit_is_found_and_named(name, row, column, fragments, pristine, tmp_path):
    checkpoint = Path(shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint"))
    tensor = load_file(pristine / "hf" / WEIGHTS)[name]
    damage(checkpoint, tensor, row, column)
    with pytest.raises(VerificationError) as caught:
        verified(checkpoint, pristine / "hf")
    assert name in str(caught.value)
    if "cannot be compared" not in str(caught.value):  # a checksum of the file may notice it first
        for fragment in [*fragments, f"{float(tensor[row, column]):.9g} in {pristine / 'hf'}"]:
            assert fragment in str(caught.value)


def test_a_conversion_whose_file_changed_on_the_disk_leaves_nothing(pristine, tmp_path, monkeypatch):
    tensor, write_latest = load_file(pristine / "hf" / WEIGHTS)[OUT_PROJECTION], converting.write_latest

    def write_and_damage(out, iteration):
        write_latest(out, iteration)
        damage(out, tensor, 0, 0)

    monkeypatch.setattr(converting, "write_latest", write_and_damage)
    with pytest.raises(VerificationError, match="Nothing was published") as caught:
        converted(pristine / "hf", tmp_path / "out")
    assert OUT_PROJECTION in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_whose_file_changed_on_the_disk_leaves_nothing(pristine, tmp_path, monkeypatch):
    def damage_weights(model, out):
        tensors = load_file(out / WEIGHTS)
        tensors[OUT_PROJECTION][1, 2] += 1
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        return copy(model, out)

    copy = exporting.copy_companions
    monkeypatch.setattr(exporting, "copy_companions", damage_weights)
    with pytest.raises(VerificationError, match="row 1, column 2") as caught:
        exported(pristine / "checkpoint", pristine / "hf", tmp_path / "out")
    assert OUT_PROJECTION in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_was_cut_off_after_it_was_written_fails_the_gate_too(pristine, tmp_path, monkeypatch):
    write_latest = converting.write_latest

    def write_and_cut(out, iteration):
        write_latest(out, iteration)
        path = max(out.rglob("*.distcp"), key=lambda path: path.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    monkeypatch.setattr(converting, "write_latest", write_and_cut)
    with pytest.raises(VerificationError, match=r"cannot be (compared|read back)"):
        converted(pristine / "hf", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_trained_checkpoint_differs_from_its_base_and_equals_its_export(pristine, tmp_path):
    checkpoint = Path(shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint"))
    (checkpoint / "release").rename(checkpoint / "iter_0000007")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("7\n")
    write_manifest(checkpoint, read_manifest(checkpoint).model_copy(update={"iteration": 7}))
    base = Path(shutil.copytree(pristine / "hf", tmp_path / "base"))
    tensors = load_file(base / WEIGHTS)
    save_file(tensors | {OUT_PROJECTION: tensors[OUT_PROJECTION] + 1}, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"was trained to iteration 7.*mflow export"):
        verified(checkpoint, base)
    out = exported(checkpoint, base, tmp_path / "out")
    assert "iteration 7" in verified(checkpoint, out).compared


def test_the_same_bits_are_the_same_whatever_they_mean():
    odd = torch.tensor([float("nan"), -0.0, float("inf")])
    assert same_bits(odd, odd.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64))
    assert same_bits(torch.arange(6.0).view(2, 3).T, torch.arange(6.0).view(2, 3).T.contiguous())


def test_weights_that_are_not_numbers_survive_and_pass(pristine, tmp_path):
    model = Path(shutil.copytree(pristine / "hf", tmp_path / "hf"))
    tensors = load_file(model / WEIGHTS)
    tensors[OUT_PROJECTION].view(torch.int32)[0, :2] = torch.tensor([0x7FC12345, 0x7F800000], dtype=torch.int32)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    assert verified(converted(model, tmp_path / "checkpoint"), model).bytes


def test_tensors_that_are_missing_or_too_many_are_named(pristine, tmp_path):
    model = Path(shutil.copytree(pristine / "hf", tmp_path / "hf"))
    tensors = load_file(model / WEIGHTS)
    save_file(tensors | {"odd.weight": torch.ones(2)}, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightMappingError, match=r"odd\.weight"):
        verified(pristine / "checkpoint", model)
    tensors.pop(OUT_PROJECTION)
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightMappingError, match=OUT_PROJECTION):
        verified(pristine / "checkpoint", model)


def test_another_model_cannot_be_compared(pristine, tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="num_layers 2"):
        verified(pristine / "checkpoint", model)


@pytest.mark.parametrize(
    ("moves", "said"),
    [
        ((Move(0, 0, 0, 8), Move(0, 8, 9, 55)), "row 8 twice or never"),
        ((Move(0, 0, 0, 63),), "leaves out row 63"),
        ((Move(0, 0, 0, 32), Move(0, 0, 32, 32)), f"no rule converts row 32 of {OUT_PROJECTION}"),
    ],
)
def test_a_rule_that_loses_or_doubles_rows_is_named(moves, said):
    plan = list(llama.FAMILY.plan(architecture()))
    require_every_row(plan)
    number = next(i for i, weight in enumerate(plan) if weight.parts[0].name == OUT_PROJECTION)
    plan[number] = replace(plan[number], moves=moves)
    with pytest.raises(WeightMappingError, match=said):
        require_every_row(plan)


def test_an_export_of_a_checkpoint_that_changed_since_it_was_converted_is_refused(pristine, tmp_path):
    """The export equals the damaged checkpoint; the certificate of the conversion knows better."""
    model, checkpoint = pristine / "hf", Path(shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint"))
    tensors = load_file(model / WEIGHTS)
    damage(checkpoint, tensors[OUT_PROJECTION], 3, 5)
    said = rf"{OUT_PROJECTION} in .*{CERTIFICATE}.*changed since it was converted; convert again$"
    with pytest.raises(CheckpointChangedError, match=said):
        exported(checkpoint, model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tensors[OUT_PROJECTION].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointChangedError, match=said):
        verified(checkpoint, other)


def test_an_export_in_the_sources_wider_type_is_compared_in_it(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1)
    checkpoint = converted(model, tmp_path / "checkpoint", dtype="bf16")
    assert "converted from" in verified(checkpoint, model).compared
    out = exported(checkpoint, model, tmp_path / "out", dtype="fp32")
    assert "exported from" in verified(checkpoint, out).compared
    tensors = load_file(out / WEIGHTS)
    tensors[DOWN_PROJECTION].view(torch.int32)[2, 3] ^= 1
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=rf"{DOWN_PROJECTION} differs at row 2, column 3.*nor is it the model"):
        verified(checkpoint, out)


def test_another_tokenizer_makes_another_model(pristine, tmp_path):
    model = Path(shutil.copytree(pristine / "hf", tmp_path / "hf"))
    (model / "added_tokens.json").write_text('{"<new>": 511}')
    with pytest.raises(VocabularyError, match="tokenizer files"):
        verified(pristine / "checkpoint", model)


CHANGES = {
    "extra vocabulary": {"extra_vocab_size": 5},
    "upcycled with noise": {"upcycle": UpcycleConfig(num_experts=4, topk=2, noise_std=0.01)},
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_the_conversion_changed_passes_against_the_source_and_against_the_export(case, pristine, tmp_path):
    model = pristine / "hf"
    checkpoint = converted(model, tmp_path / "checkpoint", verify="none", **CHANGES[case])
    out = exported(checkpoint, model, tmp_path / "out")
    assert verified(checkpoint, model).bytes == verified(checkpoint, out).bytes
    assert "made a second time by the same code" in verified(checkpoint, model).compared
    assert "same code" not in verified(checkpoint, out).compared
    damage(checkpoint, load_file(model / WEIGHTS)[OUT_PROJECTION], 0, 0)
    for folder in (model, out):
        with pytest.raises(VerificationError, match=OUT_PROJECTION):
            verified(checkpoint, folder)
