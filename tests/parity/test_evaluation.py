"""Scores through the real lm-eval: the model is asked as it was trained, and no failure becomes a zero."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_jsonl, write_model

from megatron_ext.config import EvalConfig
from megatron_ext.demo import generate
from megatron_ext.errors import EvaluationError, MegatronFlowsError, SourceError, UnsupportedModelError
from megatron_ext.evaluation.lm_eval_runner import evaluate
from megatron_ext.events import Events


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    generate("routing", 1, folder)
    return folder


@pytest.fixture(scope="module")
def scored(demo, tmp_path_factory):
    """One run of the real job in a subprocess, without network, with a home and a temporary folder of its own."""
    folder = tmp_path_factory.mktemp("scored")
    for name in ("out", "tmp", "home"):
        (folder / name).mkdir()
    job = {
        "job": "evaluate", "config": {"tasks": ["demo_routing"], "limit": 64}, "out": str(folder / "out"),
        "inputs": {"model": str(demo / "model"), "tasks": str(demo / "tasks")}, "events": str(folder / "events.jsonl"),
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    before = os.times()
    subprocess.run([sys.executable, "-m", "megatron_ext.worker", str(folder / "job.json")], env=environment, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return folder, used


def score(model, out, tasks, include_path, **config):
    out.mkdir(parents=True, exist_ok=True)
    return evaluate(
        model,
        out,
        EvalConfig(tasks=tasks, **config),
        include_path=include_path,
        batch_size=32,
        events=Events(),
        platform="cpu",
    )


def write_task(folder: Path, name: str = "own", rows=({"q": "1+1?", "a": 0},), **keys) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "rows.jsonl", list(rows))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}],
        "doc_to_text": "{{q}}", "doc_to_choice": ["2", "3"], "doc_to_target": "a",
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task | keys))  # JSON is YAML
    return folder


def test_results_hold_score_error_versions_and_documents(scored):
    results = json.loads((scored[0] / "out" / "results.json").read_text())
    assert set(results) == {"model", "tasks", "versions", "num_documents", "seconds"}
    scores = results["tasks"]["demo_routing"]
    assert set(scores) == {"acc", "acc_stderr"}
    assert 0.05 < scores["acc"] < 0.5, "random weights guess"
    assert results["num_documents"] == {"demo_routing": 64}
    assert results["versions"]["tasks"] == {"demo_routing": 1.0}


def test_the_score_is_the_mean_of_the_samples_and_they_are_all_there(scored):
    lines = [json.loads(line) for line in (scored[0] / "out" / "samples.jsonl").read_text().splitlines()]
    results = json.loads((scored[0] / "out" / "results.json").read_text())
    assert [line["doc_id"] for line in lines] == list(range(64))
    assert sum(line["acc"] for line in lines) / 64 == pytest.approx(results["tasks"]["demo_routing"]["acc"])


def test_the_prompt_and_answer_at_evaluation_equal_the_training_text(demo, scored):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    lines = [json.loads(line) for line in (scored[0] / "out" / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        for (prompt, answer), choice in zip(
            line["arguments"], ("Billing", "Delivery", "Account", "Technical"), strict=True
        ):
            assert answer == choice, "no delimiter before the answer"
            messages = [{"role": "user", "content": line["doc"]["message"]}, {"role": "assistant", "content": choice}]
            trained = tokenizer.apply_chat_template(messages, tokenize=False)
            assert trained == f"{prompt}{answer}<|im_end|>\n"
            asked = tokenizer(prompt).input_ids + tokenizer(answer).input_ids
            assert tokenizer(trained).input_ids[: len(asked)] == asked, "no token crosses from prompt to answer"


def test_progress_reaches_the_number_of_requests(scored):
    events = [json.loads(line) for line in (scored[0] / "events.jsonl").read_text().splitlines()]
    progress = [e for e in events if e["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 64 * 4
    assert events[-1]["event"] == "result"


def test_a_local_task_costs_little_and_leaves_nothing_in_temporary_folder_or_cache(scored):
    folder, used = scored
    assert used < 25, (
        f"{used:.1f} CPU-seconds: is the index of bundled tasks read?"
    )  # about 12 on the reference machine
    assert not list((folder / "tmp").glob("mflow-*"))
    assert not [p for p in (folder / "home").rglob("*") if p.is_file()]


def test_an_unknown_task_is_refused_with_the_nearest_before_anything_is_loaded(demo, tmp_path):
    started = time.process_time()
    with pytest.raises(EvaluationError, match="unknown evaluation task 'demo_rooting'; did you mean 'demo_routing'"):
        score(demo / "model", tmp_path, ("demo_rooting",), demo / "tasks")
    assert time.process_time() - started < 10
    assert not list(tmp_path.iterdir())


def test_changed_rows_under_the_same_name_change_the_score(demo, tmp_path):
    """The data set cache of one run never answers for another."""
    tasks = write_task(tmp_path / "tasks")
    first = score(demo / "model", tmp_path / "a", ("own",), tasks)
    write_jsonl(tasks / "rows.jsonl", [{"q": "1+1?", "a": 1}])
    second = score(demo / "model", tmp_path / "b", ("own",), tasks)
    assert first["tasks"]["own"]["acc"] + second["tasks"]["own"]["acc"] == 1
    assert first["tasks"]["own"]["acc_stderr"] is None, "one document has no standard error"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}},
            r"task own: its data set is missing .*gone\.jsonl",
        ),
        ({"doc_to_target": "{{missing.field}}"}, "task own"),
        (
            {"dataset_path": "nobody/nothing", "dataset_kwargs": {}},
            "task own needs a data set .* hub, which cannot be reached",
        ),
    ],
)
def test_a_task_that_cannot_be_loaded_is_an_error_that_names_it_never_a_zero(
    demo, tmp_path, monkeypatch, keys, message
):
    import datasets.config
    import huggingface_hub.constants

    for place in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    tasks = write_task(tmp_path / "tasks", **keys)
    with pytest.raises(EvaluationError, match=message):
        score(demo / "model", tmp_path / "out", ("own",), tasks)
    assert not list((tmp_path / "out").iterdir())


def test_a_broken_yaml_in_the_folder_is_named(demo, tmp_path):
    tasks = write_task(tmp_path / "tasks")
    (tasks / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(EvaluationError, match=r"broken\.yaml is not valid YAML"):
        score(demo / "model", tmp_path / "out", ("own",), tasks)


def test_a_model_without_chat_template_is_asked_through_a_named_one_or_none(demo, tmp_path):
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="has no chat template"):
        score(model, tmp_path / "out", ("demo_routing",), demo / "tasks", limit=1)
    plain = score(model, tmp_path / "out", ("demo_routing",), demo / "tasks", limit=2, apply_chat_template=False)
    assert plain["num_documents"] == {"demo_routing": 2}
    score(model, tmp_path / "out", ("demo_routing",), demo / "tasks", limit=1, chat_template="chatml")
    asked = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])["arguments"][0][0]
    assert asked.endswith("<|im_start|>assistant\n")


def test_a_model_whose_outputs_are_not_numbers_fails(demo, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    model = write_model(tmp_path / "model", num_hidden_layers=1)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MegatronFlowsError, match="not a number"):
        score(model, tmp_path / "out", ("demo_routing",), demo / "tasks", limit=2)


def test_a_missing_model_folder_is_named(demo, tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        score(tmp_path / "nowhere", tmp_path / "out", ("demo_routing",), demo / "tasks")


def test_damaged_weights_and_an_unknown_model_type_are_the_inputs_fault(demo, tmp_path):
    tasks = write_task(tmp_path / "tasks")
    model = Path(shutil.copytree(demo / "model", tmp_path / "model"))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"qwen2"', '"gpt9"'))
    with pytest.raises(UnsupportedModelError, match="gpt9"):
        score(model, tmp_path / "out", ("own",), tasks)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(SourceError, match=r"model\.safetensors is truncated"):
        score(model, tmp_path / "out", ("own",), tasks)


def test_paths_may_be_relative_to_the_working_folder(demo, tmp_path, monkeypatch):
    write_task(tmp_path / "tasks")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}<<{{ m['content'] }}>>{% endfor %}")
    monkeypatch.chdir(tmp_path)
    score(demo / "model", Path("out"), ("own",), Path("tasks"), chat_template="mine.jinja")
    sample = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["arguments"][0][0] == "<<1+1?>>"
