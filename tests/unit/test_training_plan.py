"""What a training will do is decided and refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.data.idxmap import IdxmapWriter
from megatron_ext.errors import ConfigError, DatasetFormatError, ParallelismError, PlatformError, SourceError, UserError
from megatron_ext.families.base import Architecture
from megatron_ext.training.layout import check_layout, disk_needed, parameters
from megatron_ext.training.plan import make_plan, planned_iterations
from megatron_ext.training.setup import prepare
from megatron_ext.weights.manifest import CheckpointManifest, write_latest, write_manifest
from megatron_ext.worker import Job

MODEL = Architecture(
    num_layers=4, hidden_size=64, ffn_hidden_size=160, num_attention_heads=8, num_query_groups=2, kv_channels=8,
    vocab_size=512, max_position_embeddings=512, layernorm_epsilon=1e-6,
)  # fmt: skip


def config(**values) -> TrainConfig:
    given = {"train_iters": 10} if not {"train_epochs", "train_tokens"} & set(values) else {}
    return TrainConfig(**({"seq_length": 32, "global_batch_size": 4, "lr": 1e-3, "seed": 3} | given | values))


def dataset(folder: Path, documents: list[list[int]], **manifest) -> Path:
    """Documents given by their masks; token ids count up."""
    folder.mkdir()
    lengths = np.asarray([len(d) for d in documents])
    mask = np.concatenate([np.asarray(d, dtype=np.uint8) for d in documents])
    for name, values, dtype in (("tokens", np.arange(len(mask)) % 500, np.uint16), ("loss_mask", mask, np.uint8)):
        with IdxmapWriter(folder / name, dtype) as writer:
            writer.add(values.astype(dtype), lengths)
    facts = {"format": "megatron-flows/dataset", "kind": "chat", "max_token_id": 499, "tokenizer_digest": "ab" * 16}
    (folder / "manifest.json").write_text(json.dumps(facts | manifest))
    return folder


def checkpoint(folder: Path) -> Path:
    (folder / "release").mkdir(parents=True)
    write_latest(folder, "release")
    manifest = CheckpointManifest(
        family="llama", architecture=MODEL, hf_config={}, dtype="fp32", source_dtype="fp32", vocab_size=512,
        padded_vocab_size=512, tokenizer_digest="ab" * 16, iteration="release",
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize(
    ("runtime", "named"),
    [
        ({"nproc_per_node": 3, "tensor_model_parallel_size": 2}, ["nproc_per_node 3", "multiple"]),
        ({"nproc_per_node": 4, "tensor_model_parallel_size": 4}, ["num_query_groups 2", "1, 2"]),
        ({"nproc_per_node": 3, "pipeline_model_parallel_size": 3}, ["4 layers", "1, 2, 4"]),
        ({"sequence_parallel": True}, ["sequence_parallel", "tensor_model_parallel_size of 2"]),
        ({"micro_batch_size": 3}, ["global_batch_size 4", "micro_batch_size 3"]),
        ({"nproc_per_node": 8}, ["global_batch_size 4", "data-parallel size 8"]),
        ({"overlap_param_gather": True}, ["needs overlap_grad_reduce, which is false"]),
    ],
)
def test_layouts_that_cannot_run_are_refused_with_value_and_remedy(runtime: dict, named: list[str]) -> None:
    with pytest.raises(ParallelismError) as refused:
        check_layout(MODEL, config(), RuntimeConfig(**runtime))
    for part in named:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "runtime",
    [
        {},
        {"nproc_per_node": 4, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"nproc_per_node": 4, "micro_batch_size": 1},
        {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 4},
    ],
)
def test_layouts_that_can_run_pass(runtime: dict) -> None:
    check_layout(MODEL, config(), RuntimeConfig(**runtime))


def test_processes_of_a_foreign_torchrun_must_share_the_global_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = config(global_batch_size=3, seq_length=64).model_dump()
    inputs = {
        "checkpoint": str(checkpoint(tmp_path / "checkpoint")),
        "dataset": str(dataset(tmp_path / "data", [[1] * 9 for _ in range(9)])),
    }
    job = Job(job="train", config=train, inputs=inputs, out=tmp_path / "out")
    assert prepare(job).plan.global_batch_size == 3
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelismError, match=r"global_batch_size 3 .* data-parallel size 2"):
        prepare(job)


def test_fp8_without_transformer_engine_is_refused_before_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    inputs = {
        "checkpoint": str(checkpoint(tmp_path / "checkpoint")),
        "dataset": str(dataset(tmp_path / "data", [[1] * 9])),
    }
    job = Job(job="train", config=config(precision="fp8").model_dump(), inputs=inputs, out=tmp_path / "out")
    for platform in ("auto", "cpu"):
        with pytest.raises(PlatformError, match=r"train\.precision fp8 needs Transformer Engine"):
            prepare(job.model_copy(update={"runtime": RuntimeConfig(platform=platform)}))


def test_data_order_is_a_function_of_seed_and_step_and_covers_each_epoch_once(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", [[1] * n for n in np.random.default_rng(0).integers(2, 30, 50)])
    plan, again = make_plan(config(), folder), make_plan(config(train_iters=20), folder)
    assert plan.sample_ids(7) == again.sample_ids(7)
    assert plan.sample_ids(7) != make_plan(config(seed=4), folder).sample_ids(7)
    count = len(plan.packing)
    stream = np.concatenate([plan.sequences(step) for step in range(2 * count)])
    for epoch in range(8):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert list(stream[:count]) != list(stream[count : 2 * count])


@pytest.mark.parametrize(
    ("overlong", "documents", "truncated", "dropped", "untrained"),
    [("truncate", [0, 1, 4], 1, 0, 3), ("drop", [0, 4], 0, 2, 2)],
)
def test_overlong_and_untrained_samples_are_counted(
    tmp_path: Path, overlong: str, documents: list[int], truncated: int, dropped: int, untrained: int
) -> None:
    masks = [
        [0, 1, 1],
        [0] * 20 + [1] * 20,  # too long, but something trained is left
        [0] * 32 + [1] * 8,  # too long, and everything trained is cut away
        [1, 0, 0],  # its only trained token has nothing before it
        [0] * 31 + [1],
        [1],
    ]
    plan = make_plan(config(overlong=overlong), dataset(tmp_path / "data", masks))
    assert plan.documents.tolist() == documents
    assert plan.lengths.max() == 32
    found = plan.selection
    assert (found.truncated, found.dropped_overlong, found.dropped_untrained) == (truncated, dropped, untrained)
    assert plan.summary()["samples"] == len(documents)


def test_epochs_and_tokens_become_steps(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", [[1] * 16 for _ in range(100)])
    assert len(make_plan(config(), folder).packing) == 50
    assert planned_iterations(config(train_iters=17), folder) == 17
    assert planned_iterations(config(train_epochs=2), folder) == 25
    assert planned_iterations(config(train_epochs=0.01), folder) == 1
    assert planned_iterations(config(train_epochs=1, packing=False), folder) == 25
    assert planned_iterations(config(train_tokens=32 * 4 * 9 + 5), folder) == 9


def test_a_dataset_without_anything_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetFormatError, match="none of 2 samples"):
        make_plan(config(), dataset(tmp_path / "data", [[0, 0, 0], [1, 0]]))


def test_a_mask_of_another_dataset_is_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", [[0, 1, 1]])
    with IdxmapWriter(folder / "loss_mask", np.uint8) as writer:
        writer.add(np.ones(4, dtype=np.uint8), np.asarray([4]))
    with pytest.raises(SourceError, match="differ in their lengths"):
        make_plan(config(), folder)


def test_samples_beyond_the_models_context_are_refused(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", [[1] * 40])
    with pytest.raises(ConfigError, match=r"lower train\.seq_length to 16"):
        make_plan(config(), folder, max_position_embeddings=16)
    assert make_plan(config(seq_length=64), folder, max_position_embeddings=40).lengths.tolist() == [40]


@pytest.mark.parametrize(
    "values", [{"lr_warmup_iters": 10}, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 8, "lr_warmup_iters": 3}]
)
def test_a_schedule_longer_than_the_training_is_refused(tmp_path: Path, values: dict) -> None:
    with pytest.raises(ConfigError, match="10 steps"):
        make_plan(config(**values), dataset(tmp_path / "data", [[1, 1]]))


def test_parameters_are_counted_as_transformers_counts_them() -> None:
    import transformers

    shape = transformers.Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    tied = MODEL.model_copy(update={"add_qkv_bias": True, "share_embeddings_and_output_weights": True})
    model = transformers.AutoModelForCausalLM.from_config(shape)
    assert parameters(tied) == sum(p.numel() for p in model.parameters())
    assert disk_needed(tied) > 32 * parameters(tied)


def test_room_is_asked_for_every_checkpoint_that_stays() -> None:
    def checkpoints(iterations: int, **runtime: Any) -> float:
        kept = RuntimeConfig(save_interval=10, **runtime)
        return (disk_needed(MODEL, kept, iterations) - 4 * parameters(MODEL)) / (16 * parameters(MODEL))

    assert checkpoints(100) == 2, "the last one, and the one that is being written"
    assert checkpoints(100, keep_last=4) == 5
    assert checkpoints(15, keep_last=4) == 2, "there are no more"
    assert checkpoints(100, keep_every=20) == 2 + 5
    assert checkpoints(100, keep_final_state=True) == 3


@pytest.mark.parametrize(
    ("manifest", "runtime", "error", "named"),
    [
        ({"tokenizer_digest": "cd" * 16}, {}, "VocabularyError", "mflow tokenize with the tokenizer of this model"),
        ({"max_token_id": 512}, {}, "VocabularyError", "token id 512, but the model has 512"),
        ({"kind": "preference"}, {}, "SourceError", "chosen_tokens.idx does not exist"),
        ({"kind": "song"}, {}, "DatasetFormatError", "'song'"),
        ({}, {"nproc_per_node": 3}, "ParallelismError", "data-parallel size 3"),
    ],
)
def test_the_worker_refuses_before_torch_is_imported(
    tmp_path: Path, manifest: dict, runtime: dict, error: str, named: str
) -> None:
    folder = dataset(tmp_path / "data", [[0, 1, 1]], **manifest)
    job = {
        "job": "train", "config": config().model_dump(), "runtime": runtime, "out": str(tmp_path / "out"),
        "inputs": {"checkpoint": str(checkpoint(tmp_path / "checkpoint")), "dataset": str(folder)},
        "events": str(tmp_path / "events.jsonl"),
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = (
        "import sys; from megatron_ext import worker; sys.argv[1:] = [sys.argv[1]]; code = worker.main();"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    worker = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "job.json")], capture_output=True, text=True, check=False
    )
    assert worker.returncode == 2, worker.stderr
    assert worker.stderr.startswith("error: ")
    assert named in worker.stderr
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["type"], event["exit_code"]) == (error, 2)
    assert not list((tmp_path / "out").iterdir())


def test_unknown_train_keys_are_refused() -> None:
    from megatron_ext.config_files import validated

    with pytest.raises(UserError, match="did you mean 'global_batch_size'"):
        validated(TrainConfig, {"global_batchsize": 4, "lr": 1e-3, "train_iters": 1}, "train")
