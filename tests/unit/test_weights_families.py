"""A family is one file, light enough for a flow process; what its config.json says is honoured or refused by name."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext import families
from megatron_ext.config import RuntimeConfig, TrainConfig
from megatron_ext.errors import SourceError, UnsupportedModelError
from megatron_ext.families import available, find_family
from megatron_ext.families.base import Architecture
from megatron_ext.families.hf_config import NULL_MEANS_SOMETHING, READ, REQUIRED, read_architecture
from megatron_ext.training.layout import parameters

ALL = available()
ROUTINGS = [("mixtral", True, topk) for topk in (2, 5)] + [
    (name, normalised, topk)
    for name in ("qwen2_moe", "qwen3_moe")
    for normalised, topk in ((True, 2), (True, 5), (False, 1), (False, 2), (False, 5))
]
WINDOWED = {"sliding_window": 4096, "use_sliding_window": True}
PUBLISHED = json.loads(Path(__file__).parents[1].joinpath("published_configs.json").read_text())
"""config.json of published models, as on the hub."""
PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
}
"""Weights that the hub counts in these models' files."""
FACTS = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        "rotary_base": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "meta-llama/Llama-3.2-1B": {"kv_channels": 64, "share_embeddings_and_output_weights": True},
    "mistralai/Mistral-7B-v0.1": {"window_size": 4096, "window_attn_skip_freq": None, "rotary_base": 10000.0},
    "mistralai/Mistral-7B-Instruct-v0.2": {"window_size": None, "rotary_base": 1000000.0},
    "mistralai/Mistral-Nemo-Base-2407": {"kv_channels": 128, "hidden_size": 5120},
    "mistralai/Mixtral-8x7B-v0.1": {
        "num_moe_experts": 8, "moe_router_topk": 2, "moe_router_pre_softmax": False, "moe_ffn_hidden_size": 14336,
        "moe_aux_loss_coeff": 0.02, "rotary_base": 1000000.0, "window_size": None,
    },
    "Qwen/Qwen2.5-0.5B": {"add_qkv_bias": True, "share_embeddings_and_output_weights": True, "window_size": None},
    "Qwen/Qwen2.5-72B": {"layernorm_epsilon": 1e-5, "share_embeddings_and_output_weights": False},
    "Qwen/Qwen3-0.6B": {"qk_layernorm": True, "kv_channels": 128, "add_qkv_bias": False},
    "Qwen/Qwen3-30B-A3B": {
        "num_moe_experts": 128, "moe_router_topk": 8, "moe_router_pre_softmax": False, "moe_ffn_hidden_size": 768,
        "moe_aux_loss_coeff": 0.001, "qk_layernorm": True, "kv_channels": 128,
    },
}  # fmt: skip


def architecture_of(name: str, **config) -> Architecture:
    """Of a small config of family ``name``."""
    small = {
        "model_type": name, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 16,
        "num_key_value_heads": 4, "intermediate_size": 64,
    }  # fmt: skip
    return read_architecture(find_family(name), small | config)


def transformers_config(name: str, **config):
    import transformers

    return transformers.AutoConfig.for_model(name, **config)


def module_of(name: str):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def test_a_file_named_after_a_model_type_is_a_family(tmp_path, monkeypatch):
    (tmp_path / "otherllama.py").write_text(Path(find_family.__code__.co_filename).with_name("llama.py").read_text())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    assert "otherllama" in available()
    assert find_family("otherllama").hf_architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["base", "shared", "hf_config", "__init__", "../llama", 3, None])
def test_what_is_no_family_is_not_imported(name):
    with pytest.raises(UnsupportedModelError, match="Available: llama, mistral, mixtral, qwen2"):
        find_family(name)


def test_families_and_manifests_import_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_ext.weights.manifest, megatron_ext.families as f, megatron_ext.families.hf_config\n"
        "[f.find_family(name) for name in f.available()]\n"
        "print(sorted({'torch', 'transformers', 'megatron', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ALL)
def test_plan_covers_what_transformers_builds_for_the_real_config(name):
    import torch
    import transformers

    config = transformers_config(name, num_hidden_layers=2, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    family = find_family(name)
    plan = family.plan(read_architecture(family, config.to_dict()), family.layout_of(theirs))
    assert {part.name: part.tensor_shape for weight in plan for part in weight.parts} == theirs


@pytest.mark.parametrize("name", ALL)
def test_defaults_of_left_out_config_keys_are_those_of_transformers(name):
    sizes = {
        "hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8, "vocab_size": 16
    }  # fmt: skip
    full = transformers_config(name, **sizes).to_dict()
    family = find_family(name)
    assert read_architecture(family, {"model_type": name, **sizes}) == read_architecture(family, full)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_count_the_published_weights(name):
    config = PUBLISHED[name]
    architecture = read_architecture(find_family(config["model_type"]), config)
    assert parameters(architecture) == PARAMETERS[name]
    read = architecture.model_dump()
    assert {key: read[key] for key in FACTS.get(name, {})} == FACTS.get(name, {})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_mean_the_same_in_the_spelling_of_transformers_5(name, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    family = find_family(again["model_type"])
    assert read_architecture(family, again) == read_architecture(family, PUBLISHED[name])


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        ({"sliding_window": 4096, "use_sliding_window": False}, None, None),
        (WINDOWED | {"max_window_layers": 4}, None, None),
        (WINDOWED | {"max_window_layers": 3}, 4096, (0, 0, 0, 1)),
        (WINDOWED | {"max_window_layers": 0}, 4096, None),
        (WINDOWED | {"layer_types": ["sliding_attention", "full_attention"] * 2}, 4096, (1, 0, 1, 0)),
        (WINDOWED | {"layer_types": ["full_attention"] * 4, "max_window_layers": 0}, None, None),
    ],
)
def test_windows_are_read_layer_by_layer(name, config, window, layers):
    found = architecture_of(name, **config)
    assert (found.window_size, found.window_attn_skip_freq) == (window, layers)


def test_a_window_of_null_is_none_and_one_left_out_is_that_of_transformers():
    assert architecture_of("mistral").window_size == 4096
    assert architecture_of("mistral", sliding_window=None).window_size is None
    assert architecture_of("mixtral").window_size is None
    assert architecture_of("mixtral", sliding_window=8).window_size == 8


@pytest.mark.parametrize("name", ALL)
def test_a_null_is_a_key_left_out(name):
    family = find_family(name)
    keys = READ | {*REQUIRED, *family.config_defaults, *family.config_required, *family.config_ignored}
    keys |= {"num_local_experts"} if "num_experts" in family.config_defaults else set()
    keys -= NULL_MEANS_SOMETHING
    small = {"hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 64,
             "vocab_size": 16}  # fmt: skip
    assert keys > {"head_dim", "rope_scaling", "rope_parameters", "rope_theta", "quantization_config", *small}
    for windowed in ({}, WINDOWED if "use_sliding_window" not in family.config_required else {}):
        config = {key: value for key, value in windowed.items() if key in family.config_defaults} | small
        for key in sorted(keys):
            left_out = {k: v for k, v in config.items() if k != key}
            if key in small:
                for given in (left_out, config | {key: None}):
                    with pytest.raises(
                        SourceError, match=rf"config\.json: {key} must be a positive integer, not missing"
                    ):
                        read_architecture(family, given)
            else:
                assert read_architecture(family, config | {key: None}) == read_architecture(family, left_out), key


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "key", ["num_key_value_heads", "head_dim", "sliding_window", "layer_types", "rope_scaling", "mlp_only_layers"]
)
def test_a_null_that_transformers_takes_means_what_it_takes_it_for(name, key):
    sizes = {"hidden_size": 512, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8,
             "vocab_size": 16}  # fmt: skip
    family = find_family(name)
    if key == "num_key_value_heads" and name in ("mistral", "mixtral", "qwen3_moe"):
        # transformers 5 takes a null here no more; transformers 4 took it for num_attention_heads
        assert read_architecture(family, sizes | {key: None}).num_query_groups == 32
    elif not (name == "qwen3" and key == "head_dim"):  # transformers takes no null there
        full = transformers_config(name, **sizes, **{key: None}).to_dict()
        assert read_architecture(family, sizes | {key: None}) == read_architecture(family, full)


def test_nulls_in_a_rope_are_left_out_too():
    rope = {"rope_type": "linear", "type": None, "factor": 4.0, "rope_theta": None, "partial_rotary_factor": None}
    assert architecture_of("llama", rope_parameters=rope).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    both = architecture_of("llama", rope_scaling=rope, rope_parameters=rope | {"factor": None}, rope_theta=5e5)
    assert (both.rope_scaling, both.rotary_base) == ({"rope_type": "linear", "factor": 4.0}, 5e5)
    assert architecture_of("llama", rope_parameters={"rope_type": None}).rope_scaling is None


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "config", "error", "named"),
    [
        ("llama", {"attention_bias": True}, UnsupportedModelError, ["attention_bias", "mlp_bias", "both true"]),
        ("mistral", {"attention_bias": True}, UnsupportedModelError, ["attention_bias True", "MistralForCausalLM"]),
        ("qwen3", {"attention_bias": True}, UnsupportedModelError, ["attention_bias True", "False"]),
        ("qwen2", {"mlp_bias": True}, UnsupportedModelError, ["mlp_bias"]),
        ("llama", {"hidden_act": "gelu"}, UnsupportedModelError, ["hidden_act gelu", "'silu'"]),
        ("llama", {"sliding_window": 4096}, UnsupportedModelError, ["sliding_window (4096)", "remove it from"]),
        ("llama", {"logit_scale": 0.5}, UnsupportedModelError, ["logit_scale (0.5)", "cannot be converted"]),
        ("llama", {"use_rope": False}, UnsupportedModelError, ["use_rope"]),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedModelError, ["partial_rotary_factor 0.5"]),
        ("llama", {"rope_interleaved": True}, UnsupportedModelError, ["rope_interleaved"]),
        ("llama", {"quantization_config": {"bits": 4}}, UnsupportedModelError, ["quantization_config", "unquantized"]),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, UnsupportedModelError, ["architectures"]),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, UnsupportedModelError,
         ["'dynamic'", "default, linear, llama3, yarn"]),
        ("qwen2", {"rope_parameters": {"rope_type": "yarm"}}, UnsupportedModelError, ["did you mean 'yarn'"]),
        ("llama", {"rope_parameters": YARN | {"short_factor": [1.0]}}, UnsupportedModelError, ["'short_factor'"]),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, SourceError,
         ["original_max_position_embeddings", "missing"]),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 5.0},
                   "rope_parameters": {"rope_type": "linear", "factor": 3.0}}, SourceError, ["contradict each other"]),
        ("llama", {"rope_parameters": [1]}, SourceError, ["rope_parameters must be an object"]),
        ("llama", {"rope_theta": float("inf")}, SourceError, ["rope_theta", "inf"]),
        ("llama", {"rms_norm_eps": float("nan")}, SourceError, ["rms_norm_eps", "nan"]),
        ("llama", {"num_hidden_layers": 10**9}, SourceError, ["num_hidden_layers 1000000000", "4096"]),
        ("llama", {"tie_word_embeddings": "false"}, SourceError, ["tie_word_embeddings", "'false'"]),
        ("mixtral", {"num_experts": 2, "num_local_experts": 4}, SourceError, ["contradict each other"]),
        ("llama", {"num_key_value_heads": 3}, SourceError, ["num_attention_heads 8", "num_key_value_heads 3"]),
        ("llama", {"hidden_size": 100}, SourceError, ["hidden_size 100"]),
        ("llama", {"rms_norm_eps": 0}, SourceError, ["rms_norm_eps", "0"]),
        ("llama", {"vocab_size": None}, SourceError, ["vocab_size"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, SourceError, ["layer_types", "sliding_window"]),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, UnsupportedModelError, ["layer_types", "4 layers"]),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, UnsupportedModelError, ["full_attention or sliding"]),
        ("qwen3_moe", {"mlp_only_layers": [0]}, UnsupportedModelError, ["mlp_only_layers [0]", "Available: []"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, UnsupportedModelError, ["decoder_sparse_step 2"]),
        ("qwen3_moe", {"use_sliding_window": True}, UnsupportedModelError, ["use_sliding_window True"]),
        ("qwen3_moe", {"num_experts_per_tok": 129}, SourceError, ["num_experts_per_tok 129", "128 experts"]),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1}, UnsupportedModelError,
         ["num_experts_per_tok 1", "norm_topk_prob false"]),
        ("mixtral", {"router_jitter_noise": 0.1}, UnsupportedModelError, ["router_jitter_noise 0.1"]),
        ("mixtral", {"norm_topk_prob": False}, UnsupportedModelError, ["norm_topk_prob False"]),
    ],
)  # fmt: skip
def test_what_would_compute_something_else_is_refused_by_name(name, config, error, named):
    with pytest.raises(error) as refused:
        architecture_of(name, **config)
    for part in named:
        assert part in str(refused.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        YARN,
        YARN | {"rope_theta": 1e6, "original_max_position_embeddings": 32768, "attention_factor": 1.25},
        YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2},
        YARN | {"truncate": False, "original_max_position_embeddings": 40},
        YARN | {"factor": 1.0, "original_max_position_embeddings": 8},
    ],
    ids=lambda rope: ",".join(f"{value}" for value in rope.values()),
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(name, rope):
    from megatron_ext.model.rotary import attention_factor, inverse_frequencies

    sizes = {"head_dim": 64, "max_position_embeddings": 131072, "num_hidden_layers": 4}
    config = transformers_config(name, **sizes, rope_parameters=rope)
    prefix = find_family(name).hf_architecture.removesuffix("ForCausalLM")
    theirs = getattr(module_of(name), f"{prefix}RotaryEmbedding")(config)
    architecture = read_architecture(find_family(name), config.to_dict())
    assert (inverse_frequencies(architecture) - theirs.inv_freq).abs().max() < 1e-9
    assert attention_factor(architecture) == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(("name", "normalised", "topk"), ROUTINGS)
def test_routing_is_that_of_transformers(name, normalised, topk):
    import torch
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    from megatron_ext.model.layers import experts_config

    chosen = {} if name == "mixtral" else {"norm_topk_prob": normalised}
    config = transformers_config(name, hidden_size=32, num_experts=7, num_experts_per_tok=topk, **chosen)
    router = getattr(module_of(name), find_family(name).hf_architecture.removesuffix("ForCausalLM") + "TopKRouter")
    gate = router(config)
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(topk))
    logits, weights, indices = gate(torch.randn(50, 32, generator=torch.Generator().manual_seed(1)))
    train = TrainConfig(global_batch_size=1, train_iters=1, lr=1.0)
    architecture = read_architecture(find_family(name), config.to_dict())
    ours = experts_config(architecture, train, RuntimeConfig(), fused=False)
    probs, chosen = topk_routing_with_score_function(
        logits, ours["moe_router_topk"], use_pre_softmax=ours["moe_router_pre_softmax"]
    )
    assert torch.equal(chosen, torch.zeros(50, 7).scatter(1, indices, 1.0).bool())
    torch.testing.assert_close(probs, torch.zeros(50, 7).scatter(1, indices, weights), rtol=0, atol=1e-6)
    assert (probs.sum(1) - 1).abs().max() < 1e-6 if normalised else (probs.sum(1) < 0.999).any()
