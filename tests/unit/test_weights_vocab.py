"""Extra vocabulary, the type on the way, and sizes: what comes out is what was asked for, or a refusal by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_jsonl, write_model, write_tokenizer

from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.tokenization import tokenize
from megatron_ext.errors import CheckpointError, ConfigError, PrecisionError, VocabularyError
from megatron_ext.events import Events
from megatron_ext.families.base import Part
from megatron_ext.folders import size_in_bytes
from megatron_ext.training.plan import check_vocabulary
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.hf import SafetensorsReader
from megatron_ext.weights.manifest import latest_folder, read_manifest
from megatron_ext.weights.random_rows import VALUES, NormalRows
from megatron_ext.weights.torch_dist import TorchDistReader
from megatron_ext.weights.vocab import ExtendedVocabulary, padded_vocab_size

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("pristine") / "hf", num_hidden_layers=2, vocab_size=509)


def converted(model: Path, tmp: Path, name: str = "checkpoint", **options) -> Path:
    (tmp / name).mkdir()
    convert(model, tmp / name, **{"dtype": None, "events": Events(), "verify": "digest"} | options)
    return tmp / name


def exported(checkpoint: Path, model: Path, tmp: Path, name: str = "export", **options) -> Path:
    (tmp / name).mkdir()
    export(checkpoint, model, tmp / name, **{"dtype": None, "events": Events(), "verify": "digest"} | options)
    return tmp / name


@pytest.mark.parametrize("init", ["mean", "zeros", "normal"])
def test_export_has_the_source_rows_as_they_were_and_the_extra_ones_as_asked(init, model, tmp_path):
    checkpoint = converted(model, tmp_path, extra_vocab_size=13, extra_vocab_init=init)
    out = exported(checkpoint, model, tmp_path)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert torch.equal(new[: len(old)], old), name
        if name not in (EMBEDDING, HEAD):
            assert new.shape == old.shape
            continue
        extra = new[509:]
        assert extra.shape == (13, 64)
        if init == "mean":
            torch.testing.assert_close(extra, old.double().mean(0).float().expand(13, 64), rtol=0, atol=1e-7)
        elif init == "zeros":
            assert not extra.any()
        else:
            assert len({tuple(row.tolist()) for row in extra}) == 13
            assert 0.8 < extra.std() / old.std() < 1.25
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 522
    manifest = read_manifest(checkpoint)
    assert (manifest.vocab_size, manifest.padded_vocab_size, manifest.changes.extra_vocab_size) == (522, 522, 13)
    assert manifest.changes.source_config["vocab_size"] == 509


def test_only_the_vocabulary_of_config_json_changes(model, tmp_path):
    out = exported(converted(model, tmp_path, extra_vocab_size=1), model, tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    assert after == before | {"vocab_size": 510}
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_transformers_answers_as_before_and_takes_the_extra_tokens(model, tmp_path):
    from transformers import AutoModelForCausalLM

    out = exported(converted(model, tmp_path, extra_vocab_size=13), model, tmp_path)
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (model, out))
        assert AutoModelForCausalLM.from_pretrained(out)(tokens + 490).logits.isfinite().all()
    assert after.shape[-1] == 522
    torch.testing.assert_close(after[..., :509], before, rtol=0, atol=1e-5)


def test_a_tied_embedding_is_extended_once(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1, tie_word_embeddings=True, dtype="bfloat16")
    checkpoint = converted(model, tmp_path, extra_vocab_size=3)
    assert TorchDistReader(latest_folder(checkpoint)).shapes["embedding.word_embeddings.weight"] == (515, 64)
    tensors = load_file(exported(checkpoint, model, tmp_path) / "model.safetensors")
    assert tensors[EMBEDDING].shape == (515, 64)
    assert tensors[EMBEDDING].dtype == torch.bfloat16
    assert HEAD not in tensors


def test_an_export_goes_back_into_a_checkpoint_as_it_is(model, tmp_path):
    checkpoint = converted(model, tmp_path, extra_vocab_size=13, extra_vocab_init="normal")
    out = exported(checkpoint, model, tmp_path)
    again = exported(checkpoint, out, tmp_path, "again")
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()
    third = exported(converted(out, tmp_path, "reconverted"), out, tmp_path, "third")
    assert (third / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_model_of_a_third_vocabulary_is_refused_with_both_sizes(model, tmp_path):
    other = write_model(tmp_path / "other", num_hidden_layers=2, vocab_size=511)
    with pytest.raises(CheckpointError, match=r"was made of a model of vocab_size 509, but .* says 511"):
        exported(converted(model, tmp_path, extra_vocab_size=13), other, tmp_path)


@pytest.mark.parametrize("init", ["mean", "zeros", "normal"])
def test_rows_do_not_depend_on_the_blocks_in_which_they_are_read(init, model):
    reader = ExtendedVocabulary(SafetensorsReader(model), {EMBEDDING}, 40, init)
    part = Part(EMBEDDING, (549, 64))
    whole = reader.rows(part, 0, 549)
    other = ExtendedVocabulary(SafetensorsReader(model), {EMBEDDING}, 40, init)
    blocks = torch.cat([other.rows(part, start, min(100, 549 - start)) for start in range(0, 549, 100)])
    assert torch.equal(whole, blocks)


def test_random_rows_depend_on_seed_and_name_alone():
    columns = VALUES // 10
    whole = NormalRows(1, "a", columns).rows(0, 45)
    assert torch.equal(torch.cat([NormalRows(1, "a", columns).rows(i, 9) for i in range(0, 45, 9)]), whole)
    assert not torch.equal(NormalRows(2, "a", columns).rows(0, 9), whole[:9])
    assert not torch.equal(NormalRows(1, "b", columns).rows(0, 9), whole[:9])
    assert not torch.equal(whole[:10], whole[10:20])
    assert abs(whole.mean()) < 0.01
    assert abs(whole.std() - 1) < 0.01


@pytest.mark.parametrize(
    ("size", "tp", "multiple", "padded"), [(509, 1, 1, 509), (509, 2, 1, 510), (509, 2, 128, 512), (513, 4, 128, 1024)]
)
def test_padding_is_the_next_multiple(size, tp, multiple, padded):
    assert padded_vocab_size(size, tp, multiple) == padded


def test_a_tokenizer_with_new_tokens_goes_with_as_many_extra_rows(tmp_path):
    """From conversations that use the new tokens to what training checks."""
    from transformers import AutoTokenizer

    size = len(AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "plain")))
    model = write_model(tmp_path / "hf", num_hidden_layers=1, vocab_size=size)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<red>", "<green>", "<blue>"])
    tokenizer.save_pretrained(model)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<red> 2 <blue>"}]
    rows = [write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])]
    (tmp_path / "data").mkdir()
    with pytest.raises(VocabularyError, match=rf"vocab_size is {size} .*extra_vocab_size 3"):
        tokenize(rows, model, tmp_path / "data", events=Events(), workers=1)
    tokenize(rows, model, tmp_path / "data", events=Events(), workers=1, extra_vocab_size=3)

    dataset = open_dataset(tmp_path / "data")
    assert dataset.max_token_id() == size + 2
    extended, plain = (
        read_manifest(converted(model, tmp_path, f"extra{extra}", extra_vocab_size=extra)) for extra in (3, 0)
    )
    check_vocabulary(extended, dataset)
    with pytest.raises(VocabularyError, match=str(size + 2)):
        check_vocabulary(plain, dataset)


def too_large(model: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The model with one value that fp16 cannot hold, in row 7 of the second layer's up projection."""
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: t.to(dtype) for name, t in load_file(model / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = -70000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_fp16_cannot_hold_is_refused_both_ways(dtype, model, tmp_path):
    large = too_large(model, tmp_path / "large", dtype)
    words = r"model\.layers\.1\.mlp\.up_proj\.weight holds -(70000|70144|69632).* at row 7, column 3.*fp16.*65504"
    with pytest.raises(PrecisionError, match=words):
        converted(large, tmp_path, dtype="fp16")
    assert not list((tmp_path / "checkpoint").iterdir())
    checkpoint = converted(large, tmp_path, "kept")
    with pytest.raises(PrecisionError, match=words):
        exported(checkpoint, large, tmp_path, dtype="fp16")
    assert not list((tmp_path / "export").iterdir())


def test_an_infinity_of_the_source_stays_one(model, tmp_path):
    large = too_large(model, tmp_path / "large", torch.float32)
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = torch.inf
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    out = exported(converted(large, tmp_path, dtype="fp16"), large, tmp_path)
    assert load_file(out / "model.safetensors")["model.layers.1.mlp.up_proj.weight"][7, 3] == torch.inf


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", None])
def test_any_type_goes_there_and_back(source, dtype, tmp_path):
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    model = write_model(tmp_path / "hf", num_hidden_layers=1, dtype=source)
    out = exported(converted(model, tmp_path, dtype=dtype), model, tmp_path, dtype=dtype)
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    wanted = kinds[dtype] if dtype else getattr(torch, source)
    assert all(torch.equal(after[name], before[name].to(wanted)) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {wanted}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 500 * 10**6), ("2GiB", 2 << 30), ("1.5 gb", 1_500_000_000), ("77", 77)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5 potatoes", "1e9", "0.1B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        size_in_bytes(text, "--max-shard-size")
