"""Scores a Hugging Face model with lm-eval: bundled benchmarks by name, or local task YAMLs without the network.

``include_path`` is the folder of local task YAMLs; the evaluation runs with it as working folder, so a task's
``data_files`` can be relative to it. If every task is found there, lm-eval's thousands of bundled YAMLs are not
indexed (15 s), nothing is asked of the network, and the data set cache is a temporary folder.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.config import EvalConfig
from megatron_ext.config_files import validated
from megatron_ext.data.chat_templates import find_template
from megatron_ext.errors import EvaluationError, MegatronFlowsError, UnsupportedModelError
from megatron_ext.evaluation.task_names import LocalTasks, read_local_tasks, require_known, unknown_task
from megatron_ext.hf_folder import read_config, weight_files

if TYPE_CHECKING:
    from megatron_ext.events import Events
    from megatron_ext.worker import Job

SEED = 1234
DESCRIPTION = ("name", "alias", "sample_len", "sample_count")
"""Keys of a task's results in lm-eval that are no scores."""


def evaluate(
    model: Path,
    out: Path,
    config: EvalConfig,
    *,
    include_path: Path | None,
    batch_size: int,
    events: Events,
    platform: str = "auto",
) -> dict[str, Any]:
    """Score ``model`` on ``config.tasks``; writes ``out/results.json`` and ``out/samples.jsonl``, returns the results.

    ``batch_size`` counts requests (one choice of one document); ``platform`` is cpu, cuda, npu or auto.

    Raises:
        SourceError: ``model`` is no Hugging Face folder with weights, or a file of them is damaged.
        EvaluationError: a task is unknown (names the nearest), its data cannot be read, or there is no chat template.
        UnsupportedModelError: transformers knows no such model_type.
        ChatTemplateError: ``config.chat_template`` is unknown or cannot be read.
        MegatronFlowsError: a score or an answer of the model is not a number.
    """
    from megatron_ext.weights.hf import open_safetensors

    started = time.monotonic()
    model, out = model.absolute(), out.absolute()
    include_path = include_path and include_path.absolute()
    read_config(model)
    for path in weight_files(model):
        if path.suffix == ".safetensors":
            open_safetensors(path)
    named = config.apply_chat_template and config.chat_template
    template = find_template(named, model).text if named else None
    local = read_local_tasks(include_path) if include_path else LocalTasks(frozenset(), needs_hub=True)
    require_known(config.tasks, local)
    offline = not local.needs_hub and local.names.issuperset(config.tasks)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_seclusion(offline))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if include_path:
            stack.enter_context(contextlib.chdir(include_path))
        tasks = _load_tasks(config, local, include_path, events)
        results = _score(model, tasks, config, template, batch_size, platform, events)
    summary = {
        "model": model.name,
        "tasks": {name: _scores(name, values) for name, values in results["results"].items()},
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")},
            "tasks": dict(results["versions"]),
        },
        "num_documents": {name: counts["effective"] for name, counts in results["n-samples"].items()},
        "seconds": round(time.monotonic() - started, 2),
    }
    _write_samples(out / "samples.jsonl", results["samples"])
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def run(job: Job, events: Events) -> dict[str, Any]:
    """The ``evaluate`` job: inputs ``model`` and, for local tasks, ``tasks`` (include_path); config EvalConfig."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if job.runtime.num_threads is not None:
        import torch

        torch.set_num_threads(job.runtime.num_threads)
    config = validated(EvalConfig, job.config, "job evaluate")
    tasks = job.inputs.get("tasks") or config.include_path
    return evaluate(
        Path(job.inputs["model"]),
        job.out,
        config,
        include_path=Path(tasks).absolute() if tasks else None,
        batch_size=job.runtime.evaluate_batch_size,
        events=events,
        platform=job.runtime.platform,
    )


@contextlib.contextmanager
def _seclusion(offline: bool) -> Iterator[None]:
    """While active: no request to the hub and a data set cache of its own, if ``offline``; nothing otherwise.

    The libraries read the environment when they are imported, so both it and what they read are set, and put back.
    """
    if not offline:
        yield
        return
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    import datasets.config
    import huggingface_hub.constants

    with tempfile.TemporaryDirectory(prefix="mflow-datasets-") as cache:
        settings = [
            (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
            (datasets.config, "HF_HUB_OFFLINE", True),
            (datasets.config, "HF_DATASETS_CACHE", Path(cache)),
        ]
        old = [(place, name, getattr(place, name)) for place, name, _ in settings]
        for place, name, value in settings:
            setattr(place, name, value)
        try:
            yield
        finally:
            for place, name, value in old:
                setattr(place, name, value)
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value


def _load_tasks(config: EvalConfig, local: LocalTasks, include_path: Path | None, events: Events) -> dict[str, Any]:
    """lm-eval's task objects, few-shot settings applied; bundled tasks are indexed only if a name is not local."""
    from lm_eval.tasks import TaskManager

    bundled = not local.names.issuperset(config.tasks)
    if bundled:
        events.note("indexing lm-eval's bundled tasks, about 15 s")
    manager = TaskManager(include_defaults=bundled, include_path=include_path and [str(include_path)])
    for name in config.tasks:
        if name not in manager.task_index:
            raise EvaluationError(unknown_task(name, manager.all_tasks, local))
    try:
        loaded = manager.load(list(config.tasks))
    except _loading_errors() as error:
        raise EvaluationError(_loading_failed(config.tasks, error)) from error
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if config.num_fewshot is not None and own == 0 != config.num_fewshot:
            events.note(
                f"task {name} fixes num_fewshot to 0; evaluate.num_fewshot {config.num_fewshot} is not used for it"
            )
        elif config.num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return dict(loaded)


def _loading_errors() -> tuple[type[Exception], ...]:
    import datasets.exceptions
    import jinja2

    return (
        datasets.exceptions.DatasetsError, jinja2.TemplateError, OSError, RuntimeError, ImportError,
        ValueError, KeyError, TypeError, IndexError, AttributeError,
    )  # fmt: skip


def _loading_failed(tasks: tuple[str, ...], error: Exception) -> str:
    """One sentence: which task, what went wrong, and what helps (the network's absence is the usual cause)."""
    import datasets.exceptions
    import httpx
    import huggingface_hub.errors

    chain, seen = error, []
    while chain is not None:
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    unreachable = (
        ConnectionError, httpx.TransportError, huggingface_hub.errors.OfflineModeIsEnabled,
        huggingface_hub.errors.LocalEntryNotFoundError,
    )  # fmt: skip
    names, reason = ", ".join(tasks), " ".join(f"{type(error).__name__}: {error}".split())
    if any(isinstance(e, unreachable) for e in seen):
        return (
            f"evaluation task {names} needs a data set from the Hugging Face hub, which cannot be reached "
            f"({reason}); run once with network so that it is cached, unset HF_HUB_OFFLINE, or use a local task "
            "through evaluate.include_path"
        )
    if any(isinstance(e, (FileNotFoundError, datasets.exceptions.DatasetNotFoundError)) for e in seen):
        return f"evaluation task {names}: its data set is missing ({reason}); check data_files in its YAML"
    return f"evaluation task {names} cannot be loaded: {reason}; check its YAML and data"


def _score(
    model: Path,
    tasks: dict[str, Any],
    config: EvalConfig,
    template: str | None,
    batch_size: int,
    platform: str,
    events: Events,
) -> dict[str, Any]:
    import random

    import numpy
    import torch
    from lm_eval.evaluator import evaluate as lm_evaluate
    from transformers import AutoConfig

    from megatron_ext.evaluation.observed_lm import ObservedLM

    try:
        AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(f"transformers cannot build the model of {model}/config.json: {reason}") from None

    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
    lm = ObservedLM(
        events=events,
        pretrained=str(model),
        device=_device(platform),
        dtype="auto",
        batch_size=batch_size,
        trust_remote_code=False,
    )
    if template is not None:
        lm.tokenizer.chat_template = template
    elif config.apply_chat_template and not lm.tokenizer.chat_template:
        raise EvaluationError(
            f"model {model} has no chat template, and evaluate.apply_chat_template is true; name one with "
            "evaluate.chat_template, or set evaluate.apply_chat_template=false"
        )
    results = lm_evaluate(
        lm,
        tasks,
        limit=config.limit,
        log_samples=True,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.apply_chat_template,
    )
    if not results or not results["results"]:
        raise MegatronFlowsError(f"lm-eval returned no scores for {', '.join(config.tasks)}")
    _require_numbers(results["samples"])
    return dict(results)


def _require_numbers(samples: dict[str, list[dict[str, Any]]]) -> None:
    """A model of NaNs would still get a score: whichever choice comes first.

    Raises:
        MegatronFlowsError: a log-likelihood is NaN.
    """
    for task, rows in samples.items():
        for row in rows:
            values = [v for answer in row["filtered_resps"] if isinstance(answer, (list, tuple)) for v in answer]
            if any(isinstance(value, float) and math.isnan(value) for value in values):
                raise MegatronFlowsError(
                    f"task {task}, document {row['doc_id']}: the log-likelihood is NaN, not a number; "
                    "the model's weights or outputs are broken"
                )


def _device(platform: str) -> str:
    import torch

    if platform == "npu":
        importlib.import_module("torch_npu")
        return "npu:0"
    if platform == "cpu" or (platform == "auto" and not torch.cuda.is_available()):
        return "cpu"
    return "cuda:0"


def _scores(task: str, values: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's ``"acc,none"``, ``"acc_stderr,none"`` as ``acc``, ``acc_stderr``; another filter follows in brackets.

    Raises:
        MegatronFlowsError: a score is not a finite number. A stderr that lm-eval does not give is None.
    """
    scores: dict[str, float | None] = {}
    for key, value in values.items():
        name, _, chosen = key.partition(",")
        if key in DESCRIPTION or not chosen:
            continue
        error = name.endswith("_stderr")
        metric = name.removesuffix("_stderr") + (f"[{chosen}]" if chosen != "none" else "") + "_stderr" * error
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        if not finite and not error:
            raise MegatronFlowsError(
                f"task {task}: {metric} is {value!r}, not a number; the model's outputs are broken"
            )
        scores[metric] = float(value) if finite else None
    return scores


def _write_samples(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """One line a document: what was asked, what was answered, how it scored."""
    from lm_eval.utils import handle_non_serializable

    with path.open("w", encoding="utf-8") as file:
        for task, rows in samples.items():
            for row in sorted(rows, key=lambda r: (r["doc_id"], r["filter"])):
                line = {
                    "task": task,
                    **{key: row[key] for key in ("doc_id", "doc", "target", "arguments", "filtered_resps", "filter")},
                    **{metric: row[metric] for metric in row["metrics"]},
                }
                file.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")
