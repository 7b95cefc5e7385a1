"""Files of ranks that are not what they seem: refused, or noted where only the arithmetic may differ."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rank_files import LAYER, Models, change, exported, foreign, notes_of, ranks

from megatron_ext.errors import (
    CheckpointError,
    ConfigError,
    DiskSpaceError,
    ParallelismError,
    UntrustedPickleError,
    WeightMappingError,
)
from megatron_ext.events import Events
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import MANIFEST
from megatron_ext.weights.megatron_names import Sizes
from megatron_ext.weights.megatron_writer import RankLayout
from megatron_ext.weights.relayout import relayout


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


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
