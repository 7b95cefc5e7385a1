"""Dense to mixture of experts: what is copied, what is drawn, what Hugging Face has no place for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.config import UpcycleConfig
from megatron_ext.errors import ConfigError, UnsupportedModelError
from megatron_ext.events import Events
from megatron_ext.families import find_family
from megatron_ext.families.hf_config import read_architecture
from megatron_ext.weights.changes import changed_config, changes_of
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import read_manifest
from megatron_ext.weights.megatron_writer import asked_layout
from megatron_ext.weights.upcycle import parse_upcycle

NAMES = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3",
                "block_sparse_moe.experts.{}.w2"),
    "qwen2_moe": ("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
}  # fmt: skip
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 64}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def upcycled(model: Path, tmp: Path, name: str = "upcycled", export_as: str | None = None, **fields) -> dict:
    """The tensors of the exported mixture of experts; its folder is ``tmp/name-export``."""
    for folder in (name, f"{name}-export"):
        (tmp / folder).mkdir()
    config = UpcycleConfig(**{"num_experts": 4, "topk": 2} | fields)
    convert(model, tmp / name, dtype=None, events=Events(), upcycle=config, verify="none")
    export(tmp / name, model, tmp / f"{name}-export", dtype=export_as, events=Events(), verify="digest")
    return load_file(tmp / f"{name}-export" / "model.safetensors")


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def model(request, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("dense") / "hf", request.param, num_hidden_layers=2)


def layout_of(model: Path) -> tuple[str, ...]:
    return NAMES["qwen2_moe" if json.loads((model / "config.json").read_text())["model_type"] == "qwen2" else "mixtral"]


def test_every_expert_is_the_dense_mlp_and_the_rest_is_as_it_was(model, tmp_path):
    before, after = load_file(model / "model.safetensors"), upcycled(model, tmp_path)
    router, *experts = layout_of(model)
    seen = {f"model.layers.{i}.{router}.weight" for i in range(2)}
    for i in range(2):
        for expert in range(4):
            for dense, name in zip(DENSE, experts, strict=True):
                key = f"model.layers.{i}.{name.format(expert)}.weight"
                assert torch.equal(after[key], before[f"model.layers.{i}.{dense}.weight"]), key
                seen.add(key)
    seen |= {name for name in after if "shared_expert" in name}
    rest = {name for name in before if ".mlp." not in name}
    assert set(after) == seen | rest
    assert all(torch.equal(after[name], before[name]) for name in rest)
    assert not any(tensor.any() for name, tensor in after.items() if "shared_expert" in name)


def test_routers_are_drawn_with_the_asked_deviation_from_the_seed(model, tmp_path):
    name = f"model.layers.1.{layout_of(model)[0]}.weight"
    options = {"num_experts": 16, "router_init_std": 0.3}
    routers = [
        upcycled(model, tmp_path, str(number), **options, seed=seed)[name] for number, seed in enumerate((1, 1, 2))
    ]
    assert routers[0].shape == (16, 64)
    assert abs(routers[0].std() - 0.3) < 0.03
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def test_noise_makes_every_expert_another_one_and_is_drawn_from_the_seed(model, tmp_path):
    dense = load_file(model / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    one, again = (upcycled(model, tmp_path, name, noise_std=0.01) for name in ("one", "again"))
    experts = [one[f"model.layers.1.{layout_of(model)[3].format(e)}.weight"] for e in range(4)]
    noise = torch.stack(experts) - dense
    assert abs(noise.std() - 0.01) < 0.001
    assert abs(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0)).max() < 0.05
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_a_round_trip_of_the_exported_model_is_bit_equal(model, tmp_path):
    upcycled(model, tmp_path, export_as="bf16", noise_std=0.01)
    moe = tmp_path / "upcycled-export"
    for name in ("checkpoint", "back", "direct"):
        (tmp_path / name).mkdir()
    convert(moe, tmp_path / "checkpoint", dtype=None, events=Events(), verify="digest")
    export(tmp_path / "checkpoint", moe, tmp_path / "back", dtype=None, events=Events(), verify="digest")
    export(tmp_path / "upcycled", moe, tmp_path / "direct", dtype="bf16", events=Events(), verify="digest")
    for path in moe.iterdir():
        if path.name != "certificate.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
            assert (tmp_path / "direct" / path.name).read_bytes() == path.read_bytes(), path.name


def test_transformers_loads_the_exported_model_whole_and_answers_as_the_dense_one(model, tmp_path):
    from transformers import AutoModelForCausalLM

    upcycled(model, tmp_path)
    moe, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "upcycled-export", output_loading_info=True)
    assert not any(loading.values())
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(model)(tokens).logits
        torch.testing.assert_close(moe(tokens).logits, dense, rtol=0, atol=1e-5)
        moe.model.layers[0].mlp.experts.down_proj.data[:] *= 2
        assert (moe(tokens).logits - dense).abs().max() > 1e-2


def test_files_of_ranks_hold_the_same_experts(model, tmp_path):
    """Tensor and expert parallelism, a padded vocabulary with extra rows, and back."""
    changes = {"upcycle": UpcycleConfig(num_experts=4, topk=2, noise_std=0.01), "extra_vocab_size": 5}
    for name, layout in (("whole", None), ("ranks", asked_layout("mp_rank", tp=2, ep=2))):
        for folder in (name, f"{name}-export"):
            (tmp_path / folder).mkdir()
        convert(model, tmp_path / name, dtype=None, events=Events(), layout=layout, **changes)
        export(tmp_path / name, model, tmp_path / f"{name}-export", dtype=None, events=Events(), verify="digest")
    assert (tmp_path / "ranks" / "release" / "mp_rank_01_001" / "model_optim_rng.pt").is_file()
    for name in ("config.json", "model.safetensors"):
        one, other = ((tmp_path / f"{each}-export" / name).read_bytes() for each in ("whole", "ranks"))
        assert one == other, name


def test_the_manifest_says_what_was_done(model, tmp_path):
    upcycled(model, tmp_path)
    manifest = read_manifest(tmp_path / "upcycled")
    assert manifest.family == manifest.hf_config["model_type"] in NAMES
    assert manifest.changes.source_config == json.loads((model / "config.json").read_text())
    assert manifest.changes.upcycle == UpcycleConfig(num_experts=4, topk=2)
    assert manifest.architecture.num_moe_experts == 4


def config_of(model_type: str, **changes) -> dict:
    config = {"model_type": model_type, **SMALL, **changes}
    return {key: value for key, value in config.items() if value != "left out"}


@pytest.mark.parametrize(
    "config",
    [
        config_of("llama", num_key_value_heads="left out"),
        config_of("llama", rope_theta=5e5, rope_scaling=LLAMA3, rms_norm_eps=1e-5, head_dim=16),
        config_of("llama", rope_parameters={"rope_theta": 5e5, **LLAMA3}, tie_word_embeddings=True),
        config_of("llama", attention_bias=False, mlp_bias=False, pretraining_tp=1),
        config_of("mistral", num_key_value_heads="left out", num_attention_heads=8),
        config_of("mistral", sliding_window=None),
        config_of("mistral", sliding_window=16, head_dim=4),
        config_of("qwen2", num_attention_heads=32, num_key_value_heads="left out"),
        config_of("qwen2", sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True),
    ],
)
def test_nothing_but_the_mlp_changes_in_the_architecture_whatever_config_json_leaves_out(config):
    dense = read_architecture(find_family(config["model_type"]), config)
    changed = changed_config(config, changes_of(config, upcycle=UpcycleConfig(num_experts=4, topk=2)))
    experts = read_architecture(find_family(changed["model_type"]), changed)
    same = {field for field in type(dense).model_fields if "moe" not in field}
    assert dense.model_dump(include=same) == experts.model_dump(include=same)
    assert (experts.num_moe_experts, experts.moe_router_topk, experts.moe_router_pre_softmax) == (4, 2, False)
    assert experts.moe_ffn_hidden_size == dense.ffn_hidden_size
    import transformers

    theirs = transformers.AutoConfig.for_model(**changed)
    assert read_architecture(find_family(theirs.model_type), theirs.to_dict()) == experts


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of("llama", attention_bias=True, mlp_bias=True), "add_bias_linear True.*MixtralForCausalLM"),
        (config_of("qwen2", use_sliding_window=True, max_window_layers=0), "use_sliding_window True.*Qwen2MoeFor"),
        (config_of("mixtral", num_local_experts=4), "'mixtral' cannot be upcycled.*llama, mistral, qwen2"),
        (config_of("qwen3", head_dim=16), "'qwen3' cannot be upcycled"),
    ],
)
def test_what_hugging_face_has_no_experts_for_is_refused(config, words):
    with pytest.raises(UnsupportedModelError, match=words):
        changed_config(config, changes_of(config, upcycle=UpcycleConfig()))


def test_a_refused_upcycling_leaves_nothing_behind(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(UnsupportedModelError):
        convert(model, tmp_path / "out", dtype=None, events=Events(), upcycle=UpcycleConfig())
    assert not list((tmp_path / "out").iterdir())


def test_equal_logits_cannot_be_demanded_of_experts_with_noise(tmp_path):
    with pytest.raises(ConfigError, match=r"noise_std 0\.1"):
        convert(tmp_path, tmp_path, dtype=None, events=Events(), upcycle=UpcycleConfig(noise_std=0.1), verify="logits")


def test_the_option_reads_every_field():
    assert parse_upcycle("num_experts=4,topk=3, router_init_std=0.1,noise_std=1e-3,seed=7") == UpcycleConfig(
        num_experts=4, topk=3, router_init_std=0.1, noise_std=1e-3, seed=7
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8", r"'8' is not of the form key=value"),
        ("num_expert=8", r"'num_expert'; did you mean 'num_experts'"),
        ("num_experts=eight", "num_experts"),
        ("num_experts=2,topk=3", "topk 3 is more than num_experts 2"),
        ("num_experts=8,topk=1", "topk 1.*router"),
        ("num_experts=8,noise_std=-1", "noise_std"),
    ],
)
def test_an_option_that_does_not_fit_is_named(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_upcycle(text)


def test_the_commands_take_the_options_and_say_what_they_did(tmp_path):
    write_model(tmp_path / "hf", num_hidden_layers=1)

    def said(*arguments: str) -> dict:
        command = [sys.executable, "-m", "megatron_ext.cli", *arguments, "--json"]
        return json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)

    asked = ["--upcycle", "num_experts=3,topk=2", "--extra-vocab-size", "7", "--extra-vocab-init", "zeros"]
    made = said("convert", "--model", "hf", "--out", "mcore", "--dtype", "bf16", "--verify", "none", *asked)
    assert (made["family"], made["vocab_size"], made["dtype"]) == ("mixtral", 519, "bf16")
    assert (made["upcycle"]["num_experts"], made["upcycle"]["step_zero"]) == (3, None)
    made = said("export", "--checkpoint", "mcore", "--model", "hf", "--out", "moe", "--max-shard-size", "50KB")
    assert (made["family"], made["dtype"], made["verified"]["level"]) == ("mixtral", "bf16", "digest")
    assert max(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")) < 80_000
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_local_experts"] == 3


PEAK = """
import sys, threading
from pathlib import Path
from megatron_ext.config import UpcycleConfig
from megatron_ext.events import Events
from megatron_ext.weights.convert import convert

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024

before, samples, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        samples.append(anonymous() - before)
threading.Thread(target=watch, daemon=True).start()
Path(sys.argv[2]).mkdir()
noise = UpcycleConfig(num_experts=int(sys.argv[3]), noise_std=0.01)
convert(Path(sys.argv[1]), Path(sys.argv[2]), dtype="bf16", events=Events(), upcycle=noise, extra_vocab_size=64)
done.set()
print(max(samples))
"""


def test_memory_does_not_grow_with_the_experts(tmp_path):
    model = write_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=512, intermediate_size=2048, vocab_size=2048)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(model), str(tmp_path / str(experts)), str(experts)],
                capture_output=True, text=True, env=environment, check=True,
            ).stdout
        )
        for experts in (4, 24)
    ]  # fmt: skip
    assert peaks[1] < peaks[0] + 60, peaks  # MB; the twenty more experts hold 126
