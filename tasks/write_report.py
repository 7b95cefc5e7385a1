"""Stage write-report: one HTML file about everything that was done."""

from __future__ import annotations

from typing import Any

from megatron_ext.config import Recipe, RuntimeConfig
from tasks.artifacts import EvalReport, HFModel, IdxmapDataset, McoreCheckpoint, Report, Sources, Training
from tasks.build import Build, Input
from tasks.stage import recorded_stages, stage


@stage("write-report", version=3, makes=Report)
def write_report(
    recipe: Recipe,
    sources: Sources,
    base: McoreCheckpoint,
    tokens: IdxmapDataset,
    trained: Training,
    exported: HFModel,
    scores: dict[str, EvalReport],
    validation: IdxmapDataset | None = None,
    *,
    runtime: RuntimeConfig,
) -> Build:
    """Config, versions, inputs, curves, throughput, scores, samples and the time of each stage, in one file.

    Raises:
        WorkerFailedError: the subprocess died; ends with the last lines of its log.
    """
    evaluations = {name: report.whole for name, report in scores.items()}
    return Build(
        job="report",
        identity={"recipe": _without_places(recipe)},
        config={"recipe": recipe.model_dump(mode="json"), **recorded_stages()},
        inputs={
            "training": trained.whole,
            "dataset": tokens.whole,
            "validation": validation.whole if validation else None,
            "checkpoint": base.whole,
            "export": exported.whole,
            "tokenizer": sources.tokenizer,
            "evaluations": Input(
                {name: given.identity for name, given in evaluations.items()},
                lambda: {name: given.locate() for name, given in evaluations.items()},
                "the scores",
            ),
        },
        runtime=runtime,
    )


def _without_places(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what is not hashed: where things lie and how they ran."""
    values = recipe.model_dump(exclude={"runtime": True, "model": {"path"}, "data": {"files", "validation_files"}})
    values["evaluate"].pop("include_path")
    return values
