"""Files of ranks: round trips at any sizes, layouts that other programs write, imports without a manifest, refusals."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from bare import bare_model
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.errors import (
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    ParallelismError,
    UntrustedPickleError,
    VerificationError,
    WeightMappingError,
)
from megatron_ext.events import Events, Follower
from megatron_ext.training.setup import prepare
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import MANIFEST, read_manifest
from megatron_ext.weights.megatron_names import FILE, Naming, Sizes
from megatron_ext.weights.megatron_writer import RankLayout
from megatron_ext.weights.relayout import relayout
from megatron_ext.weights.torch_dist import TorchDistReader
from megatron_ext.weights.verify import verify
from megatron_ext.worker import Job

MODELS = {
    "llama": {"vocab_size": 509, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
}
ONE = Sizes()
NAMES = Naming()
ALL = [Sizes(*sizes) for sizes in itertools.product((1, 2, 4), (1, 2), (1, 2))]
DENSE = [sizes for sizes in ALL if sizes.ep == 1]
SIZES = {
    "llama": DENSE, "qwen2": [Sizes(2, 1), Sizes(4, 2)], "qwen2 tied": DENSE, "mixtral": ALL,
    "qwen3_moe": [Sizes(1, 1, 2), Sizes(2, 2, 2)], "qwen2_moe": [Sizes(1, 1, 2), Sizes(2, 2, 2)],
}  # fmt: skip
LAYER = "decoder.layers."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the Hugging Face folder of a case, written once."""
    tmp, done = tmp_path_factory.mktemp("models"), {}

    def model(case: str) -> Path:
        if case not in done:
            done[case] = write_model(tmp / case, case.split()[0], dtype="bfloat16", **MODELS[case])
        return done[case]

    return model


def ranks(model: Path, folder: Path, sizes: Sizes = ONE, naming: Naming = NAMES, **options) -> Path:
    """The checkpoint folder of ``model`` in files of ranks."""
    folder.mkdir()
    layout = RankLayout(sizes, naming, options.pop("make_vocab_size_divisible_by", 128))
    convert(model, folder, dtype=options.pop("dtype", None), events=Events(), layout=layout, **options)
    return folder


def exported(checkpoint: Path, model: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    folder.mkdir()
    export(checkpoint, model, folder, dtype=options.pop("dtype", None), events=Events(), **options)
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_source(back: dict[str, torch.Tensor], model: Path) -> None:
    source = load_file(model / "model.safetensors")
    assert back.keys() == source.keys()
    assert [name for name in source if back[name].dtype != source[name].dtype] == []
    assert [name for name in source if not torch.equal(back[name], source[name])] == []


def foreign(model: Path, folder: Path, sizes: Sizes = ONE, naming: Naming = NAMES) -> Path:
    """Files of ranks as another program leaves them: without our manifest."""
    ranks(model, folder, sizes, naming)
    (folder / MANIFEST).unlink()
    return folder


def change(path: Path, how) -> None:
    """Save the state of a rank's file again, changed by ``how`` in place."""
    state = torch.load(path / FILE, weights_only=False)
    how(state)
    torch.save(state, path / FILE)


@pytest.mark.parametrize(
    ("case", "sizes"), [pytest.param(c, s, id=f"{c} {'-'.join(map(str, s))}") for c in MODELS for s in SIZES[c]]
)
def test_round_trip_is_bit_equal_at_any_sizes(case, sizes, models, tmp_path):
    checkpoint = ranks(models(case), tmp_path / "ranks", sizes)
    assert len(list((checkpoint / "release").iterdir())) == sizes.tp * sizes.pp * sizes.ep
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert_source(exported(checkpoint, models(case), tmp_path / "back"), models(case))


@pytest.mark.parametrize(
    "naming", [Naming("local"), Naming("transformer_engine", True)], ids=["local norms", "grouped experts"]
)
def test_both_namings_read_back(naming, models, tmp_path):
    checkpoint = foreign(models("mixtral"), tmp_path / "ranks", Sizes(2, 1, 2), naming)
    assert_source(exported(checkpoint, models("mixtral"), tmp_path / "back"), models("mixtral"))
    dense = foreign(models("llama"), tmp_path / "dense", Sizes(2, 2), Naming(naming.transformer_impl))
    assert_source(exported(dense, models("llama"), tmp_path / "dense back"), models("llama"))


def test_a_rank_file_says_what_megatron_lm_asks_and_loads_with_its_allow_list(models, tmp_path):
    path = ranks(models("qwen2"), tmp_path / "ranks", Sizes(2, 2)) / "release" / "mp_rank_01_001" / FILE
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(path, weights_only=True)
    args = state["args"]
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
    assert (args.num_layers, args.hidden_size, args.num_attention_heads, args.num_query_groups) == (4, 64, 8, 2)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by, args.params_dtype) == (512, 128, torch.bfloat16)
    assert (args.add_qkv_bias, args.swiglu, args.untie_embeddings_and_output_weights) == (True, True, True)
    assert state["model"][f"{LAYER}1.mlp.linear_fc1.weight"].shape == (160, 64)
    assert f"{LAYER}2.mlp.linear_fc1.weight" not in state["model"]


@pytest.mark.parametrize(("divisor", "rows"), [(128, 512), (1, 510), (100, 600)])
def test_the_vocabulary_is_padded_with_zeros_to_what_megatron_expects(divisor, rows, models, tmp_path):
    checkpoint = ranks(models("llama"), tmp_path / "ranks", Sizes(tp=2), make_vocab_size_divisible_by=divisor)
    name = "embedding.word_embeddings.weight"
    shards = [
        torch.load(checkpoint / "release" / f"mp_rank_0{rank}" / FILE, weights_only=False)["model"][name]
        for rank in range(2)
    ]
    whole = torch.cat(shards)
    assert [len(shard) for shard in shards] == [rows // 2] * 2
    assert torch.equal(whole[:509], load_file(models("llama") / "model.safetensors")["model.embed_tokens.weight"])
    assert not whole[509:].any()
    assert read_manifest(checkpoint).padded_vocab_size == rows


def test_dtype_is_changed_on_the_way_in_and_out(models, tmp_path):
    checkpoint = ranks(models("qwen2"), tmp_path / "ranks", Sizes(tp=2), dtype="fp32")
    state = torch.load(checkpoint / "release" / "mp_rank_00" / FILE, weights_only=False)
    assert {t.dtype for t in state["model"].values() if isinstance(t, torch.Tensor)} == {torch.float32}
    assert state["args"].params_dtype == torch.float32
    assert_source(exported(checkpoint, models("qwen2"), tmp_path / "back", dtype="bf16"), models("qwen2"))


def test_virtual_pipeline_stages_are_put_in_order(models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(tp=2))
    for tp in range(2):
        whole = checkpoint / "release" / f"mp_rank_0{tp}"
        model = torch.load(whole / FILE, weights_only=False)["model"]
        for stage in range(2):  # layers 0 and 2 are on stage 0, layers 1 and 3 on stage 1
            state = {}
            for chunk in range(2):
                prefix = f"{LAYER}{2 * chunk + stage}."
                part = {f"{LAYER}0." + k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
                if (chunk, stage) == (0, 0):
                    part |= {k: v for k, v in model.items() if k.startswith("embedding")}
                if (chunk, stage) == (1, 1):
                    part |= {k: v for k, v in model.items() if k.startswith(("decoder.final", "output"))}
                state[f"model{chunk}"] = part
            target = checkpoint / "release" / f"mp_rank_0{tp}_00{stage}"
            target.mkdir()
            torch.save(state, target / FILE)
        shutil.rmtree(whole)
    assert_source(exported(checkpoint, models("qwen2"), tmp_path / "back"), models("qwen2"))


def test_experts_of_the_legacy_grouped_gemm_are_unstacked(models, tmp_path):
    """GroupedMLP of megatron-core views weight1 as (experts, in, out) and weight2 as (experts, in, out)."""
    checkpoint = foreign(models("mixtral"), tmp_path / "ranks", Sizes(2, 1, 2))

    def stack(state):
        model = state["model"]
        for layer, (number, name) in itertools.product(range(4), ((1, "linear_fc1"), (2, "linear_fc2"))):
            prefix = f"{LAYER}{layer}.mlp.experts."
            own = [model.pop(f"{prefix}local_experts.{e}.{name}.weight").t().contiguous() for e in range(2)]
            shape = (64, -1) if number == 1 else (-1, 64)
            model[f"{prefix}weight{number}"] = torch.stack(own).view(shape)

    for path in (checkpoint / "release").iterdir():
        change(path, stack)
    assert_source(exported(checkpoint, models("mixtral"), tmp_path / "back"), models("mixtral"))


def test_experts_that_tensor_parallelism_does_not_split_are_read_whole(models, tmp_path):
    """expert_tensor_parallel_size 1: as many files as ranks, each with whole experts of its own."""
    split, whole = (foreign(models("mixtral"), tmp_path / str(s), s) for s in (Sizes(2, 1, 2), Sizes(1, 1, 2)))
    for rank in range(2):
        experts = torch.load(whole / "release" / f"mp_rank_00_00{rank}" / FILE, weights_only=False)["model"]
        shutil.rmtree(split / "release" / f"mp_rank_0{rank}_00{1 - rank}")
        change(
            split / "release" / f"mp_rank_0{rank}_00{rank}",
            lambda state, own=experts: state["model"].update({k: v for k, v in own.items() if ".experts." in k}),
        )
    assert_source(exported(split, models("mixtral"), tmp_path / "back"), models("mixtral"))


def test_wrappers_and_what_else_a_training_saved_do_not_disturb(models, tmp_path):
    checkpoint = foreign(models("llama"), tmp_path / "ranks", Sizes(tp=2))

    def wrap(state):
        model = {f"module.module.{name}": value for name, value in state["model"].items()}
        model["module.module.decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8")
        model["module.module.rotary_pos_emb.inv_freq"] = torch.ones(4)
        state.update(model=model, iteration=500, optimizer={"state": {0: torch.ones(9)}}, rng_state=[{}])

    for path in (checkpoint / "release").iterdir():
        change(path, wrap)
    (checkpoint / "release").rename(checkpoint / "iter_0000500")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("500")
    assert_source(exported(checkpoint, models("llama"), tmp_path / "back"), models("llama"))


def test_a_foreign_checkpoint_is_imported_for_training_and_exports_again(models, tmp_path):
    model = models("qwen2 tied")
    checkpoint = foreign(model, tmp_path / "ranks", Sizes(2, 2))
    (tmp_path / "imported").mkdir()
    summary = relayout(checkpoint, model, tmp_path / "imported", dtype=None, events=Events(), verify="digest")
    assert summary["verified"]["bytes"] == summary["bytes"]
    manifest = read_manifest(tmp_path / "imported")
    assert (manifest.layout, manifest.dtype, manifest.padded_vocab_size) == ("torch_dist", "bf16", 512)
    direct = tmp_path / "direct"
    direct.mkdir()
    convert(model, direct, dtype=None, events=Events())
    ours, theirs = TorchDistReader(tmp_path / "imported" / "release"), TorchDistReader(direct / "release")
    assert ours.shapes == theirs.shapes
    assert [key for key in ours.shapes if not torch.equal(*(whole(r, key) for r in (ours, theirs)))] == []
    assert_source(exported(tmp_path / "imported", model, tmp_path / "back"), model)


@pytest.mark.parametrize("write", [ranks, foreign])
def test_training_refuses_files_of_ranks_and_says_how_to_import_them(write, models, tmp_path):
    checkpoint = write(models("qwen2"), tmp_path / "ranks")
    config = {"seq_length": 64, "global_batch_size": 1, "train_iters": 1, "lr": 1.0}
    inputs = {"checkpoint": str(checkpoint), "dataset": str(tmp_path)}
    with pytest.raises(CheckpointError, match=f"mflow convert --model HF_DIR --checkpoint {checkpoint} --out DIR"):
        prepare(Job(job="train", config=config, inputs=inputs, out=tmp_path / "out"))


def whole(reader: TorchDistReader, key: str) -> torch.Tensor:
    return reader.read(key, (0,) * len(reader.shapes[key]), reader.shapes[key])


def test_a_trained_checkpoint_goes_into_files_of_ranks(models, tmp_path):
    model, trained, out = models("qwen2"), tmp_path / "trained", tmp_path / "ranks"
    trained.mkdir()
    convert(model, trained, dtype=None, events=Events())
    manifest = read_manifest(trained).model_copy(update={"iteration": 7})
    (trained / MANIFEST).write_text(manifest.model_dump_json())
    (trained / "release").rename(trained / "iter_0000007")
    (trained / "latest_checkpointed_iteration.txt").write_text("7")
    out.mkdir()
    layout = RankLayout(Sizes(2, 2))
    relayout(trained, model, out, dtype="fp32", events=Events(), layout=layout, verify="digest")
    manifest = read_manifest(out)
    assert (manifest.layout, manifest.parallel_sizes) == ("mp_rank", {"tp": 2, "pp": 2, "ep": 1})
    assert json.loads((out / "certificate.json").read_text())["level"] == "digest"
    assert_source(exported(out, model, tmp_path / "back", dtype="bf16"), model)


def test_verify_compares_files_of_ranks_with_their_source_and_names_what_differs(models, tmp_path):
    checkpoint = ranks(models("mixtral"), tmp_path / "ranks", Sizes(2, 1, 2), verify="digest")
    verify(checkpoint, models("mixtral"), level="digest", events=Events())
    change(
        checkpoint / "release" / "mp_rank_01_001",
        lambda state: state["model"][f"{LAYER}2.mlp.experts.local_experts.1.linear_fc2.weight"][3].zero_(),
    )
    with pytest.raises(VerificationError, match=r"layers\.2\.block_sparse_moe\.experts\.3\.w2\.weight.*row 3"):
        verify(checkpoint, models("mixtral"), level="digest", events=Events())


def refused(error: type[Exception], checkpoint: Path, model: Path, tmp_path: Path, *fragments: str, **options) -> None:
    out = tmp_path / "refused"
    out.mkdir()
    with pytest.raises(error) as caught:
        export(checkpoint, model, out, dtype=None, events=Events(), **options)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
    assert list(out.iterdir()) == []


def test_a_malicious_file_of_a_rank_runs_nothing_until_it_is_trusted(models, tmp_path):
    trace, checkpoint = tmp_path / "ran", foreign(models("qwen2"), tmp_path / "ranks", Sizes(tp=2))

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    change(checkpoint / "release" / "mp_rank_01", lambda state: state.update(args=Malicious()))
    refused(UntrustedPickleError, checkpoint, models("qwen2"), tmp_path, "mp_rank_01", "system", "--trust-pickle")
    assert not trace.exists()
    exported(checkpoint, models("qwen2"), tmp_path / "back", trust_pickle=True)
    assert trace.exists()


@pytest.mark.parametrize("lost", ["mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001"])
def test_a_missing_rank_is_named(lost, models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(2, 2))
    shutil.rmtree(checkpoint / "release" / lost)
    refused(CheckpointError, checkpoint, models("qwen2"), tmp_path, lost)


@pytest.mark.parametrize("kept", [Sizes(1, 2), Sizes(2, 1)])
def test_the_last_ranks_missing_is_never_a_smaller_model(kept, models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(2, 2))
    for path in (checkpoint / "release").iterdir():
        tp, pp = (int(number) for number in path.name.split("_")[2:])
        if tp >= kept.tp or pp >= kept.pp:
            shutil.rmtree(path)
    refused((CheckpointError, WeightMappingError), checkpoint, models("qwen2"), tmp_path)


def test_a_model_that_the_files_are_not_of_is_refused(models, tmp_path):
    checkpoint = foreign(models("llama"), tmp_path / "ranks")
    refused(WeightMappingError, checkpoint, models("qwen3_moe"), tmp_path, "no tensor")
    (tmp_path / "refused").rmdir()
    model = Path(shutil.copytree(models("llama"), tmp_path / "hf"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused(CheckpointError, checkpoint, model, tmp_path, "linear_fc1", "320", "256")


def set_args(checkpoint: Path, **settings) -> Path:
    for path in (checkpoint / "release").iterdir():
        change(path, lambda state: vars(state["args"]).update(settings))
    return checkpoint


def notes_of(events: Path) -> list[str]:
    return [event["text"] for event in Follower(events).new() if event["event"] == "note"]


def notes_of_export(checkpoint: Path, model: Path, tmp_path: Path) -> list[str]:
    """What an export with its gate tells of the checkpoint's settings."""
    (tmp_path / "back").mkdir()
    events = Events(tmp_path / "events")
    export(checkpoint, model, tmp_path / "back", dtype=None, events=events, verify="digest")
    return [note for note in notes_of(tmp_path / "events") if not note.startswith("verified")]


def test_heads_of_other_sizes_that_fill_the_same_rows_are_refused(models, tmp_path):
    """8 heads of 8 and 2 groups fill the same rows as 4 heads of 16 and 1 group."""
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks")
    model = Path(shutil.copytree(models("qwen2"), tmp_path / "hf"))
    config = json.loads((model / "config.json").read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    (model / "config.json").write_text(json.dumps(config | heads))
    refused(CheckpointError, checkpoint, model, tmp_path, "num_attention_heads 8", "implies 4")


@pytest.mark.parametrize(
    ("case", "name", "value", "implied"),
    [
        ("qwen2", "apply_layernorm_1p", True, "False"),
        ("qwen2", "rotary_interleaved", True, "False"),
        ("qwen2", "rotary_percent", 0.5, "1.0"),
        ("qwen2", "position_embedding_type", "learned_absolute", "rope"),
        ("qwen2", "position_embedding_type", "yarn", "rope"),
        ("qwen2", "swiglu", False, "True"),
        ("qwen2", "squared_relu", True, "False"),
        ("qwen2", "normalization", "LayerNorm", "RMSNorm"),
        ("qwen2", "ffn_hidden_size", 80, "160"),
        ("qwen2", "vocab_size", 600, "512"),
        ("mixtral", "moe_router_score_function", "sigmoid", "softmax"),
        ("mixtral", "moe_router_topk_scaling_factor", 2.5, "1.0"),
    ],
)
def test_settings_that_make_another_model_of_the_same_weights_are_refused(case, name, value, implied, models, tmp_path):
    checkpoint = set_args(foreign(models(case), tmp_path / "ranks"), **{name: value})
    refused(CheckpointError, checkpoint, models(case), tmp_path, f"{name} {value}", f"implies {implied}", "--model")


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        ("qwen2", "rotary_base", 500000),
        ("qwen2", "norm_epsilon", 0.1),
        ("qwen2", "window_size", (15, 0)),
        ("qwen2", "use_rope_scaling", True),
        ("mixtral", "moe_router_pre_softmax", True),
    ],
)
def test_settings_that_only_compute_are_noted_once(case, name, value, models, tmp_path):
    checkpoint = set_args(foreign(models(case), tmp_path / "ranks"), **{name: value})
    (note,) = notes_of_export(checkpoint, models(case), tmp_path)
    assert f"{name} {value}" in note
    assert "computes something else" in note


def test_what_other_programs_save_beside_the_models_settings_passes_without_a_word(models, tmp_path):
    settings = {
        "num_experts": None, "ffn_hidden_size": 160, "moe_router_score_function": "sigmoid", "moe_router_topk": 2,
        "moe_router_topk_scaling_factor": None, "moe_router_pre_softmax": True, "vocab_size": None, "rotary_base": 1e4,
    }  # fmt: skip
    checkpoint = set_args(foreign(models("qwen2"), tmp_path / "ranks", Sizes(tp=2)), **settings)
    assert notes_of_export(checkpoint, models("qwen2"), tmp_path) == []


def append_rows(checkpoint: Path, count: int) -> Path:
    """Rows that no padding explains, in embedding and output layer of every rank."""

    def append(state):
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            state["model"][name] = torch.cat([state["model"][name], torch.ones(count, 64, dtype=torch.bfloat16)])

    for path in (checkpoint / "release").iterdir():
        change(path, append)
    return checkpoint


def test_rows_of_tokens_that_the_model_does_not_have_are_not_dropped_as_padding(models, tmp_path):
    checkpoint = append_rows(foreign(models("qwen2"), tmp_path / "ranks", Sizes(tp=2)), 50)
    refused(
        CheckpointError, checkpoint, models("qwen2"), tmp_path, "612 rows", "100 more", "128", "makes 512", "tokenizer"
    )


def test_rows_whose_number_no_setting_explains_are_noted(models, tmp_path):
    checkpoint = append_rows(foreign(models("qwen2"), tmp_path / "ranks"), 100)
    set_args(checkpoint, make_vocab_size_divisible_by=None, vocab_size=None)
    (note,) = notes_of_export(checkpoint, models("qwen2"), tmp_path)
    assert "612 rows, 100 more than vocab_size 512" in note


def test_files_without_padding_pass_whatever_divisor_their_settings_name(models, tmp_path):
    checkpoint = ranks(models("llama"), tmp_path / "ranks", make_vocab_size_divisible_by=1)
    (checkpoint / MANIFEST).unlink()
    set_args(checkpoint, make_vocab_size_divisible_by=128)
    assert notes_of_export(checkpoint, models("llama"), tmp_path) == []


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("rope", "fragment"),
    [
        (YARN, "rope_type yarn"),
        (LLAMA3 | {"low_freq_factor": 2.0}, "low_freq_factor 2"),
        (LLAMA3 | {"original_max_position_embeddings": 4096}, "original_max_position_embeddings 4096"),
        ({"rope_type": "default", "rope_theta": 10000.5}, "rope_theta 10000.5"),
        (LLAMA3, None),
    ],
)
def test_a_rope_that_megatron_lms_settings_cannot_say_is_noted(rope, fragment, models, tmp_path):
    model = Path(shutil.copytree(models("llama"), tmp_path / "hf"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "max_position_embeddings": 16384}))
    for name in ("direct", "trained", "anew"):
        (tmp_path / name).mkdir()
    layout = RankLayout(Sizes(tp=2))
    convert(model, tmp_path / "direct", dtype=None, events=Events(tmp_path / "1"), layout=layout)
    convert(model, tmp_path / "trained", dtype=None, events=Events(tmp_path / "2"))
    relayout(tmp_path / "trained", model, tmp_path / "anew", dtype=None, events=Events(tmp_path / "3"), layout=layout)
    told = [notes_of(tmp_path / number) for number in "123"]
    assert [len(notes) for notes in told] == ([1, 0, 1] if fragment else [0, 0, 0])
    assert all(fragment in note and "--use-checkpoint-args" in note for notes in told for note in notes)


def test_a_parameter_that_no_rule_knows_is_named_by_its_layer_in_the_whole_model(models, tmp_path):
    checkpoint = foreign(models("llama"), tmp_path / "ranks", Sizes(pp=2))
    change(
        checkpoint / "release" / "mp_rank_00_001",
        lambda state: state["model"].update({f"{LAYER}1.self_attention.q_layernorm.weight": torch.ones(8)}),
    )
    refused(WeightMappingError, checkpoint, models("llama"), tmp_path, f"{LAYER}3.self_attention.q_layernorm.weight")


def test_a_parameter_that_one_rank_lacks_is_named(models, tmp_path):
    name = f"{LAYER}1.mlp.linear_fc2.weight"
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(2, 2))
    change(checkpoint / "release" / "mp_rank_01_001", lambda state: state["model"].pop(name))
    refused(CheckpointError, checkpoint, models("qwen2"), tmp_path, "mlp.linear_fc2.weight, layer 3 ", "rank 1")


def test_ranks_of_several_iterations_are_refused(models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(tp=2))
    change(checkpoint / "release" / "mp_rank_01", lambda state: state.update(iteration=500))
    refused(CheckpointError, checkpoint, models("qwen2"), tmp_path, "mp_rank_01", "iteration 500", "iteration 0")


@pytest.mark.parametrize(
    ("case", "sizes", "rank", "name"),
    [
        ("qwen2", Sizes(2, 2), "mp_rank_01_001", "self_attention.linear_qkv.layer_norm_weight"),
        ("llama", Sizes(tp=2), "mp_rank_01", "mlp.linear_fc2.bias"),
        ("mixtral", Sizes(2, 1, 2), "mp_rank_01_000", "mlp.router.weight"),
        ("mixtral", Sizes(1, 1, 2), "mp_rank_00_001", "mlp.router.weight"),
    ],
)
def test_what_ranks_hold_copies_of_must_be_the_same_on_all(case, sizes, rank, name, models, tmp_path):
    checkpoint = foreign(models(case), tmp_path / "ranks", sizes)
    change(checkpoint / "release" / rank, lambda state: state["model"][f"{LAYER}1.{name}"].view(-1)[3].add_(1))
    layer = 1 + 2 * (sizes.pp - 1)
    refused(CheckpointError, checkpoint, models(case), tmp_path, f"{name}, layer {layer} of {rank}", "one checkpoint")


def test_names_from_before_megatron_core_are_refused(models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks")
    old = {"language_model": {"encoder": {"layers.0.input_norm.weight": torch.ones(4)}}}
    change(checkpoint / "release" / "mp_rank_00", lambda state: state.update(model=old))
    refused(CheckpointError, checkpoint, models("qwen2"), tmp_path, "language_model.encoder", "before megatron-core")


def test_an_untied_checkpoint_does_not_pass_for_a_tied_model(models, tmp_path):
    checkpoint = foreign(models("qwen2"), tmp_path / "ranks", Sizes(pp=2))
    refused(CheckpointError, checkpoint, models("qwen2 tied"), tmp_path, "output_layer.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("case", "sizes", "error", "fragments"),
    [
        ("qwen2", Sizes(tp=3), ParallelismError, ["--tp 3", "num_attention_heads 8"]),
        ("qwen2", Sizes(pp=3), ParallelismError, ["--pp 3", "num_layers 4"]),
        ("qwen2", Sizes(ep=2), ParallelismError, ["--ep 2", "none"]),
        ("mixtral", Sizes(ep=3), ParallelismError, ["--ep 3", "num_moe_experts 4"]),
        ("qwen2", Sizes(tp=0), ConfigError, ["--tp", "at least 1"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_is_written(
    case, sizes, error, fragments, models, tmp_path
):
    left = tmp_path / "ranks" / "left by a killed attempt"
    left.mkdir(parents=True)
    with pytest.raises(error) as caught:
        convert(models(case), left.parent, dtype=None, events=Events(), layout=RankLayout(sizes))
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []
    assert left.exists()


def test_too_little_room_for_all_ranks_is_refused_before_the_first_byte(models, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match="needs"):
        ranks(models("qwen2"), tmp_path / "ranks", Sizes(tp=2))
    assert list((tmp_path / "ranks").iterdir()) == []


PEAK = """
import json, sys, threading
from pathlib import Path
from megatron_ext.events import Events, Follower
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.megatron_names import Sizes
from megatron_ext.weights.megatron_writer import RankLayout

def anonymous():
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) // 1024

def peak_of(function, *folders, **options):
    Path(folders[-1]).mkdir()
    before, samples, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            samples.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    function(*map(Path, folders), dtype=None, events=Events(), **options)
    done.set()
    watcher.join()
    return max(samples)

model, peaks = sys.argv[1], {}
peaks["convert"] = peak_of(convert, model, model + "-ranks", layout=RankLayout(Sizes(2, 2)))
peaks["export"] = peak_of(export, model + "-ranks", model, model + "-back")
print(json.dumps(peaks))
"""


def test_memory_is_bounded(tmp_path):
    model = bare_model(tmp_path / "hf", layers=10)  # 136 MB
    run = subprocess.run(
        [sys.executable, "-c", PEAK, model], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert max(json.loads(run.stdout).values()) < 60, run.stdout  # MB
