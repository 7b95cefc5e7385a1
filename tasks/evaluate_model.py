"""Stages evaluate-base and evaluate-tuned: lm-eval scores of one model, an artifact each."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.config import EvalConfig, RuntimeConfig
from tasks.artifacts import EvalReport, HFModel, Sources
from tasks.build import Build, Input
from tasks.stage import stage
from tasks.templates import template_argument, template_identity

IDENTITY = "evaluate-model"
RECIPE_ONLY = {"baseline", "include_path"}
"""Keys that say what to score and where the tasks lie; the tasks' content is an input."""


@stage("evaluate-base", version=1, makes=EvalReport, identity=IDENTITY)
def evaluate_base(evaluate: EvalConfig, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Score the model the recipe starts from. A new training does not repeat it.

    Raises:
        EvaluationError: a task is unknown or failed; a failed task is never a zero.
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    return _scored(evaluate, sources.model, sources, runtime)


@stage("evaluate-tuned", version=1, makes=EvalReport, identity=IDENTITY)
def evaluate_tuned(evaluate: EvalConfig, exported: HFModel, sources: Sources, *, runtime: RuntimeConfig) -> Build:
    """Score the exported model on the same tasks. Raises what ``evaluate_base`` raises."""
    return _scored(evaluate, exported.whole, sources, runtime)


def _scored(evaluate: EvalConfig, model: Input, sources: Sources, runtime: RuntimeConfig) -> Build:
    template = template_identity(evaluate.chat_template, Path(sources.model.locate()))
    return Build(
        job="evaluate",
        identity={"evaluate": {**evaluate.model_dump(exclude=RECIPE_ONLY), "chat_template": template}},
        config={**evaluate.model_dump(), "chat_template": template_argument(evaluate.chat_template)},
        inputs={"model": model, "tasks": sources.tasks},
        runtime=runtime,
    )
