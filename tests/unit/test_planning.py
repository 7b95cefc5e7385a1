"""What depends on what: planned in an empty store, without Prefect and without running anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import full_dpo, upcycle_sft
from flows.catalog import sections_of
from flows.explaining import explain, explain_recipe, planned_stages
from flows.full_sft import sentence
from flows.recipes import load_recipe
from megatron_ext.errors import ConfigError, SourceError, UnsupportedModelError, UserError
from tasks.checks import check_recipe
from tasks.estimates import steps_to_run
from tasks.store import Store

ROOT = Path(__file__).resolve().parents[2]
DEMO, DEMO_UPCYCLE = (ROOT / "deployments" / "recipes" / f"demo_{name}.yaml" for name in ("sft", "upcycle"))
CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip

TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [
            {"id": 66, "content": "<b>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
        ],
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(66)}, "merges": []},
    }
)  # fmt: skip
TASKS = {"evaluate.include_path": "tasks", "evaluate.tasks": ["t"]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's files, data and a benchmark; the recipe's paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MFLOW_ARTIFACTS", str(tmp_path / "store"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{} \n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text("task: t\n")
    return tmp_path


def recipe(**changes: Any) -> dict[str, Any]:
    settings = {"model.path": "model", "data.files": ["a.jsonl"]} | TASKS | changes
    return sections_of(load_recipe(DEMO, [f"{key}={json.dumps(value)}" for key, value in settings.items()]))


def fingerprints(**changes: Any) -> dict[str, str]:
    return {p.stage: p.fingerprint for p in planned_stages(sentence, recipe(**changes))}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in before if before[stage] != after[stage]}


DOWNSTREAM = {"train-model", "export-checkpoint", "evaluate-tuned", "write-report"}


def test_a_learning_rate_changes_training_and_what_follows(place: Path) -> None:
    assert changed(fingerprints(), fingerprints(**{"train.lr": 7e-4})) == DOWNSTREAM


def test_other_data_does_not_convert_or_score_the_base_again(place: Path) -> None:
    after = fingerprints(**{"data.files": ["b.jsonl"]})
    assert changed(fingerprints(), after) == DOWNSTREAM | {"pin-sources", "tokenize-dataset"}


def test_the_order_of_data_files_is_part_of_the_data(place: Path) -> None:
    one, two = (fingerprints(**{"data.files": files}) for files in (["a.jsonl", "b.jsonl"], ["b.jsonl", "a.jsonl"]))
    assert "tokenize-dataset" in changed(one, two)


def test_a_folder_a_glob_and_the_files_themselves_are_the_same_data(place: Path) -> None:
    (place / "rows").mkdir()
    for name in ("a", "b"):
        shutil.copy(place / f"{name}.jsonl", place / "rows")
    named = fingerprints(**{"data.files": ["a.jsonl", "b.jsonl"]})
    for given in (["rows"], ["rows/*.jsonl"]):
        assert fingerprints(**{"data.files": given})["tokenize-dataset"] == named["tokenize-dataset"]
    (place / "rows" / "c.jsonl").write_text("{}  \n")
    assert fingerprints(**{"data.files": ["rows"]})["tokenize-dataset"] != named["tokenize-dataset"]


def test_weights_of_a_blend_are_part_of_the_data_but_not_the_names_of_the_files(place: Path) -> None:
    plain, even, uneven = (
        fingerprints(**{"data.files": files})["tokenize-dataset"]
        for files in (["a.jsonl", "b.jsonl"], ["2:a.jsonl", "2:b.jsonl"], ["2:a.jsonl", "b.jsonl"])
    )
    assert len({plain, even, uneven}) == 3
    (place / "elsewhere").mkdir()
    for name in ("a", "b"):
        shutil.copy(place / f"{name}.jsonl", place / "elsewhere")
    assert fingerprints(**{"data.files": ["2:elsewhere/a.jsonl", "elsewhere/b.jsonl"]})["tokenize-dataset"] == uneven


def test_a_url_is_known_by_what_its_server_says(place: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/rows/train.jsonl", b"{}\n")
    before = fingerprints(**{"data.files": ["memory://rows/train.jsonl"]})
    assert changed(before, fingerprints(**{"data.files": ["memory://rows/train.jsonl"]})) == set()
    memory.pipe("/rows/train.jsonl", b"{} \n")
    after = fingerprints(**{"data.files": ["memory://rows/train.jsonl"]})
    assert changed(before, after) == DOWNSTREAM | {"pin-sources", "tokenize-dataset"}
    memory.rm("/rows", recursive=True)


OWN = {"data.validation_files": ["b.jsonl"]}


def test_validation_files_are_tokenized_beside_the_data_and_train_again(place: Path) -> None:
    before, after = fingerprints(), fingerprints(**OWN)
    assert changed(before, after) == DOWNSTREAM | {"pin-sources"}
    assert list(after)[2:4] == ["tokenize-dataset", "tokenize-validation"]
    (place / "b.jsonl").write_text("{}    \n")
    assert changed(after, fingerprints(**OWN)) == DOWNSTREAM | {"pin-sources", "tokenize-validation"}
    moved = {"data.validation_files": ["moved/b.jsonl"]}
    (place / "moved").mkdir()
    shutil.copy("b.jsonl", "moved")
    assert fingerprints(**moved) == fingerprints(**OWN)


def test_a_file_is_one_dataset_whether_it_is_trained_on_or_validated_on(place: Path) -> None:
    trained = fingerprints(**{"data.files": ["b.jsonl"]})
    assert fingerprints(**OWN)["tokenize-validation"] == trained["tokenize-dataset"]
    assert fingerprints(**OWN)["train-model"] != trained["train-model"]


def publish(stage: str, **changes: Any) -> None:
    """An empty artifact of a planned stage in the store."""
    planned = next(p for p in planned_stages(sentence, recipe(**changes)) if p.stage == stage)
    store, kind, spec = Store.current(), planned.spec.makes.kind, planned.spec
    with store.locked(kind, planned.fingerprint):
        partial = store.open_partial(kind, planned.fingerprint)
        (partial / "nothing").write_text("")
        store.publish(
            partial, {}, stage=spec.identity, version=spec.version, kind=kind, fingerprint=planned.fingerprint,
            identity=planned.build.document(spec.identity, spec.version), inputs=planned.build.named(),
            pointer=planned.build.pointer(spec.identity, spec.version), runtime={}, seconds=1.0, summary={},
        )  # fmt: skip


def test_explain_names_the_key_of_the_validation_files(place: Path) -> None:
    publish("tokenize-dataset")
    plan = planned_stages(sentence, recipe(**OWN))
    told = {e.stage: e.reason for e in explain(plan)}
    assert told["tokenize-validation"] == "data.validation_files changed"
    assert told["tokenize-dataset"] == ""
    for stage in ("pin-sources", "convert-checkpoint", "train-model"):
        publish(stage)
    told = {e.stage: e.reason for e in explain(planned_stages(sentence, recipe(**OWN)))}
    assert told["train-model"] == "tokenize-validation will build"
    assert told["pin-sources"] == "data.validation_files changed"


def test_the_steps_are_not_counted_on_the_validation_set(place: Path) -> None:
    epochs = {**OWN, "train.train_epochs": 2}
    publish("tokenize-validation", **epochs)
    steps = steps_to_run(planned_stages(sentence, recipe(**epochs)))
    assert steps is not None
    assert steps.last is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.validation_files": ["a.jsonl"]}, r"data\.validation_files: \S*/a\.jsonl is in data\.files, too"),
        ({"data.validation_files": ["copies"]}, r"copies/c\.jsonl holds the same bytes as \S*/a\.jsonl"),
        ({"data.validation_files": ["nothing.jsonl"]}, r"data\.validation_files: .*nothing\.jsonl"),
        ({"data.validation_files": ["b.jsonl", "b.jsonl"]}, r"data\.validation_files: .*b\.jsonl is named twice"),
        (
            {"data.files": ["demo://routing"], "data.validation_files": ["demo://routing?seed=1"]},
            r"demo://routing\?seed=1 is in data\.files, too",
        ),
        ({**OWN, "train.validation_fraction": 0.1}, r"validation_files and train\.validation_fraction 0\.1 exclude"),
        ({**OWN, "data.format": "preference"}, r"hold out some of data\.files with train\.validation_fraction"),
    ],
)
def test_a_validation_set_that_is_none_is_refused_before_anything_runs(place: Path, settings: dict, words: str) -> None:
    (place / "copies").mkdir()
    shutil.copy("a.jsonl", "copies/c.jsonl")
    with pytest.raises(UserError, match=words):
        check_recipe(**recipe(**settings))
    assert not list((place / "store").glob("*/*"))


def test_a_flow_refuses_them_by_itself_too(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.validation_fraction"):
        planned_stages(full_dpo.sentence, recipe(**OWN))
    with pytest.raises(ConfigError, match="exclude each other"):
        planned_stages(sentence, recipe(**OWN, **{"train.validation_fraction": 0.1}))


def test_a_demo_is_a_validation_set_of_another_seed(place: Path) -> None:
    before, after = (fingerprints(**{"data.validation_files": [f"demo://routing?seed={n}"]}) for n in (2, 3))
    assert changed(before, after) == DOWNSTREAM | {"pin-sources", "tokenize-validation"}


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("data.append_eod", True),
        ("data.max_length", 99),
        ("data.columns", {"text": "body"}),
        ("data.on_bad_row", "skip"),
    ],
)
def test_a_knob_of_the_data_tokenizes_again(place: Path, knob: str, value: Any) -> None:
    assert "tokenize-dataset" in changed(fingerprints(), fingerprints(**{knob: value}))


def test_the_number_of_workers_does_not_tokenize_again(place: Path) -> None:
    assert changed(fingerprints(), fingerprints(**{"runtime.workers": 7})) == set()


def test_other_weights_do_not_tokenize_again(place: Path) -> None:
    before = fingerprints()
    (place / "model" / "model.safetensors").write_bytes(b"other weights")
    assert "tokenize-dataset" not in changed(before, fingerprints())
    assert {"convert-checkpoint", "evaluate-base"} <= changed(before, fingerprints())


def test_a_moved_copy_is_the_same_source(place: Path) -> None:
    before = fingerprints()
    shutil.copytree("model", "elsewhere")
    (place / "elsewhere" / "README.md").write_text("not a part of the model")
    (place / "other").mkdir()
    shutil.copy("a.jsonl", "other/a.jsonl")
    shutil.copy("a.jsonl", "other_name.jsonl")
    assert fingerprints(**{"model.path": "elsewhere", "data.files": ["other/a.jsonl"]}) == before
    assert changed(before, fingerprints(**{"data.files": ["other_name.jsonl"]})) == {"pin-sources"}


def test_where_it_runs_changes_nothing(place: Path) -> None:
    runtime = {"runtime.nproc_per_node": 2, "runtime.micro_batch_size": 1, "runtime.platform": "cpu"}
    assert changed(fingerprints(), fingerprints(**runtime)) == set()


def test_a_benchmark_that_changed_scores_both_again_and_trains_nothing(place: Path) -> None:
    before = fingerprints()
    (place / "tasks" / "t.yaml").write_text("task: t\nlimit: 1\n")
    scored = {"evaluate-base", "evaluate-tuned", "write-report", "pin-sources"}
    assert changed(before, fingerprints()) == scored


@pytest.mark.parametrize("model", ["model", "demo://routing"])
def test_the_disk_needed_is_known_before_anything_is_made(place: Path, model: str) -> None:
    settings = [f"{k}={v}" for k, v in {"model.path": model, "data.files": "[a.jsonl]"}.items()]
    said = json.loads(
        explain_recipe("full-sft", DEMO, [*settings, "evaluate.include_path=tasks", "evaluate.tasks=[t]"], True)
    )
    assert 50_000_000 < said["disk_bytes"] < 200_000_000
    assert said["steps"] == {"first": 0, "last": 400}


def test_without_a_baseline_the_base_is_not_scored(place: Path) -> None:
    assert "evaluate-base" not in fingerprints(**{"evaluate.baseline": False})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model.path": "nowhere"}, SourceError, "nowhere"),
        ({"data.files": ["nothing.jsonl"]}, SourceError, "nothing.jsonl"),
        ({"data.files": ["tasks"]}, SourceError, "data.files: folder tasks holds no data files"),
        ({"evaluate.include_path": "no_tasks"}, SourceError, "no_tasks"),
        ({"evaluate.tasks": ["no_such_task"]}, UserError, "no_such_task"),
        ({"data.chat_template": "qwen25"}, UserError, "did you mean"),
        ({"model.path": "demo://rooting"}, ConfigError, "did you mean 'routing'"),
        ({"model.path": "demo://routing?sed=1"}, ConfigError, "seed"),
        ({"runtime.tensor_model_parallel_size": 3, "runtime.nproc_per_node": 3}, UserError, "num_attention_heads 4"),
        ({"runtime.nproc_per_node": 3}, UserError, "global_batch_size"),
        (
            {"model.path": "demo://routing", "runtime.tensor_model_parallel_size": 2, "runtime.nproc_per_node": 3},
            UserError,
            "multiple of tensor_model_parallel_size 2",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(place: Path, settings: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        check_recipe(**recipe(**settings))
    assert not list((place / "store").glob("*/*"))


def test_a_source_that_cannot_be_read_is_refused(place: Path) -> None:
    (place / "tasks" / "notes.txt").symlink_to("/proc/self/mem")  # nobody can read its first byte, not even root
    with pytest.raises(SourceError, match=r"cannot read .*notes\.txt"):
        check_recipe(**recipe())


def test_an_unsupported_model_type_is_refused(place: Path) -> None:
    (place / "model" / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen22"}))
    with pytest.raises(UnsupportedModelError, match="qwen2"):
        check_recipe(**recipe())


def test_a_hub_id_offline_names_the_id_and_the_remedy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError, match=r"Qwen/Nothing.*HF_HUB_OFFLINE.*local Hugging Face folder"):
        check_recipe(**recipe(**{"model.path": "Qwen/Nothing"}))


def test_a_typo_in_a_nested_key_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"train\.lrr.*did you mean 'lr'"):
        load_recipe(DEMO, ["train.lrr=1"])


@pytest.mark.parametrize("options", [{"num_experts": 4}, {"num_experts": 4, "seed": 7}])
def test_upcycling_converts_again_and_tokenizes_and_scores_the_base_once(place: Path, options: dict) -> None:
    after = fingerprints(**{"model.upcycle": options})
    assert changed(fingerprints(), after) == DOWNSTREAM | {"convert-checkpoint"}
    assert changed(fingerprints(**{"model.upcycle": {"num_experts": 8}}), after) == DOWNSTREAM | {"convert-checkpoint"}


def test_extra_vocabulary_converts_again_and_how_it_starts_matters_where_there_is_some(place: Path) -> None:
    (place / "model" / "tokenizer.json").write_text(TOKENIZER)
    extra = {"model.extra_vocab_size": 5}
    assert changed(fingerprints(), fingerprints(**extra)) == DOWNSTREAM | {"convert-checkpoint"}
    zeros = {"model.extra_vocab_init": "zeros"}
    assert "convert-checkpoint" in changed(fingerprints(**extra), fingerprints(**extra, **zeros))
    assert "convert-checkpoint" not in changed(fingerprints(), fingerprints(**zeros))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.extra_vocab_size": 2}, r"'<b>' with id 66, but .* 64 .* \+ 2 .*extra_vocab_size 3"),
        ({"model.extra_vocab_size": 3}, r"evaluate\.baseline: the base model has 64 rows"),
    ],
)
def test_a_tokenizer_with_more_tokens_than_rows_is_refused_before_anything_runs(
    place: Path, settings: dict, words: str
) -> None:
    (place / "model" / "tokenizer.json").write_text(TOKENIZER)
    with pytest.raises(UserError, match=words):
        check_recipe(**recipe(**settings))
    assert check_recipe(**recipe(**{"model.extra_vocab_size": 3, "evaluate.baseline": False})).vocab_size == 67


def test_the_shape_that_is_checked_is_that_of_the_experts(place: Path) -> None:
    shape = check_recipe(**recipe(**{"model.upcycle": {"num_experts": 4}}))
    assert (shape.num_moe_experts, shape.moe_ffn_hidden_size) == (4, 32)
    with pytest.raises(UnsupportedModelError, match="use_sliding_window"):
        (place / "model" / "config.json").write_text(json.dumps(CONFIG | {"use_sliding_window": True}))
        check_recipe(**recipe(**{"model.upcycle": {"num_experts": 4}}))


def test_flow_upcycle_sft_needs_upcycling(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.upcycle.*full-sft"):
        planned_stages(upcycle_sft.sentence, recipe())


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("full-sft", DEMO),
        ("upcycle-sft", DEMO_UPCYCLE),
        ("full-pretrain", DEMO.with_name("demo_pretrain.yaml")),
        ("full-dpo", DEMO.with_name("demo_dpo.yaml")),
    ],
)
def test_the_deployment_carries_the_demo_recipe(name: str, path: Path) -> None:
    import yaml

    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    demo = next(d for d in deployments if d["name"] == name)
    assert demo["parameters"] == yaml.safe_load(path.read_text())
    gpu, ascend = (d for d in deployments if d["entrypoint"] == demo["entrypoint"] and d is not demo)
    for other, platform in ((gpu, "cuda"), (ascend, "npu")):
        assert other["name"] == other["work_pool"]["name"]
        assert other["parameters"] == {"runtime": {"platform": platform}}
    assert (gpu["name"], ascend["name"]) == ("gpu", "ascend")
    assert len({(d["entrypoint"], d["name"]) for d in deployments}) == len(deployments)
