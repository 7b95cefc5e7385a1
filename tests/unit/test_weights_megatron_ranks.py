"""Files of ranks: round trips at any sizes, layouts that other programs write, imports without a manifest."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from bare import bare_model
from rank_files import LAYER, MODELS, Models, assert_source, change, exported, foreign, ranks
from safetensors.torch import load_file

from megatron_ext.errors import CheckpointError, VerificationError
from megatron_ext.events import Events
from megatron_ext.training.setup import prepare
from megatron_ext.weights.convert import convert
from megatron_ext.weights.manifest import MANIFEST, read_manifest
from megatron_ext.weights.megatron_names import FILE, Naming, Sizes
from megatron_ext.weights.megatron_writer import RankLayout
from megatron_ext.weights.relayout import relayout
from megatron_ext.weights.torch_dist import TorchDistReader
from megatron_ext.weights.verify import verify
from megatron_ext.worker import Job

ALL = [Sizes(*sizes) for sizes in itertools.product((1, 2, 4), (1, 2), (1, 2))]
DENSE = [sizes for sizes in ALL if sizes.ep == 1]
SIZES = {
    "llama": DENSE, "qwen2": [Sizes(2, 1), Sizes(4, 2)], "qwen2 tied": DENSE, "mixtral": ALL,
    "qwen3_moe": [Sizes(1, 1, 2), Sizes(2, 2, 2)], "qwen2_moe": [Sizes(1, 1, 2), Sizes(2, 2, 2)],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


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
