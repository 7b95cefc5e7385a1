"""One self-contained HTML file about a run: what ran, curves, scores, samples of the data, and the time of each stage.

The same inputs give the same bytes. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ext.data.inspection import inspect_dataset, render_html
from megatron_ext.errors import CheckpointError, SourceError
from megatron_ext.evaluation.compare import Score, compare, comparison_cells
from megatron_ext.report import page
from megatron_ext.report.charts import line_chart
from megatron_ext.weights.certificate import facts, read_certificate

if TYPE_CHECKING:
    from megatron_ext.events import Events
    from megatron_ext.worker import Job

FLOWS = {"text": "full-pretrain", "chat": "full-sft", "preference": "full-dpo"}
"""Kind of dataset -> the flow that trains on it."""
LOSS_OF = {"text": "mean over all tokens", "chat": "mean over trained tokens", "preference": "mean over pairs"}
SAMPLES = 4
"""Conversations shown."""
NOT_VERIFIED = "none: it was not compared with what it was made from"


def run(job: Job, events: Events) -> dict[str, Any]:
    """The ``report`` job: the run's folders by role as inputs; recipe, stages and versions as config."""
    text = render(job.inputs, job.config)
    (job.out / "report.html").write_text(text, encoding="utf-8")
    events.progress(len(text), len(text), "characters")
    return {"report": "report.html", "characters": len(text)}


def render(inputs: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        inputs: role -> folder: ``training``, ``dataset``, ``checkpoint``, ``export``, ``tokenizer``,
            ``validation`` (if it has files of its own), and ``evaluations`` (``tuned`` and, if there is a baseline,
            ``base``).
        config: ``recipe`` (the flow's parameters), ``stages`` (name, state, seconds, artifact), ``versions``.

    Raises:
        SourceError: a folder lacks what the report shows.
    """
    metrics = read_metrics(Path(inputs["training"]) / "metrics.jsonl")
    training = Path(inputs["training"])
    validation = read_metrics(training / "validation.jsonl") if (training / "validation.jsonl").exists() else []
    planned = _read_json(training / "schedule.json")["points"] if (training / "schedule.json").exists() else []
    manifest = _read_json(Path(inputs["training"]) / "manifest.json")
    results = {name: _read_json(Path(folder) / "results.json") for name, folder in inputs["evaluations"].items()}
    recipe = config.get("recipe", {})
    kind = _read_json(Path(inputs["dataset"]) / "manifest.json").get("kind", "chat")
    flow = "upcycle-sft" if recipe.get("model", {}).get("upcycle") else FLOWS[kind]
    title = f"{flow}: {recipe.get('model', {}).get('path', manifest['family'])}"
    parts = [
        _head(title, manifest, recipe),
        page.cards(_headlines(results, metrics, validation, manifest)),
        page.section("Scores", _score_table(results)),
        page.section("Training", _curves(metrics, validation, planned, kind) + _training_facts(manifest)),
        page.section("Time", _stages(config.get("stages", []))),
        page.section("Data", _data(Path(inputs["dataset"]))),
        page.section("Verification", _verification(inputs)),
        page.section("What ran", _what_ran(inputs, config, manifest, results)),
        "<footer>Written by megatron-flows. Every figure was measured in this run.</footer>",
    ]
    return page.document(title, "".join(parts))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in the order of their steps.

    Raises:
        SourceError: there is no such file, or a line is damaged.
    """
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; a training folder holds metrics.jsonl") from None
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}; train again") from None
    return sorted(records, key=lambda record: record["step"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist; the report needs it") from None
    except ValueError as error:
        raise SourceError(f"{path} is damaged: {error}; build its stage again") from None


def _head(title: str, manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    shape = manifest["architecture"]
    line = (
        f"{manifest['family']}, {shape['num_layers']} layers × {shape['hidden_size']}, vocabulary "
        f"{manifest['vocab_size']:,}, trained on {', '.join(recipe.get('data', {}).get('files', ['?']))}"
    )
    return f'<h1>{page.esc(title)}</h1><p class="dim">{page.esc(line)}</p>'


def _headlines(
    results: Mapping[str, Any],
    metrics: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    manifest: Mapping[str, Any],
) -> list[tuple[str, str]]:
    entries = []
    for score in compare(results["tuned"], results.get("base"))[:2]:
        before = "" if score.base is None else f"{score.base:.3f} → "
        entries.append((f"{before}{score.tuned:.3f}", f"{score.metric}, {score.task}"))
    if metrics:
        first, last = metrics[0], metrics[-1]
        entries.append((f"{first['loss']:.3g} → {last['loss']:.3g}", f"training loss, {last['step']:,} steps"))
    if validation:
        entries.append((f"{validation[-1]['loss']:.3g}", f"validation loss, step {validation[-1]['step']:,}"))
    if "accuracy" in (last := (validation or metrics or [{}])[-1]):
        entries.append((f"{last['accuracy']:.1%}", "of pairs: the better answer preferred"))
    summary = (manifest.get("training") or {}).get("summary", {})
    if "tokens_per_second" in summary:
        entries.append((f"{summary['tokens_per_second']:,.0f}", "tokens a second in training"))
    if "seconds" in summary:
        entries.append((seconds(summary["seconds"]), "training loop"))
    return entries


def _score_table(results: Mapping[str, Any]) -> str:
    header, rows = comparison_cells(results["tuned"], results.get("base"))
    scores = compare(results["tuned"], results.get("base"))
    counts = ", ".join(f"{task}: {count:,} documents" for task, count in results["tuned"]["num_documents"].items())
    note = f"± is one standard error. {counts}."
    table = page.table(header, rows, numbers=range(2, len(header)), marks=[_verdict(score) for score in scores])
    return table + f'<p class="dim">{page.esc(note)}</p>'


def _verdict(score: Score) -> str:
    """``better`` or ``worse`` when the difference is at least two standard errors; higher counts as better."""
    error = score.difference_stderr
    if score.difference is None or error is None or abs(score.difference) < 2 * error:
        return ""
    return "better" if score.difference > 0 else "worse"


def _curves(
    metrics: list[dict[str, Any]], validation: list[dict[str, Any]], planned: list[list[float]], kind: str
) -> str:
    charts = []
    for key, caption, unit in (
        ("loss", "Loss", LOSS_OF[kind]),
        ("accuracy", "Preferred the better answer", "share of pairs"),
        ("margin", "Margin", "reward of the better answer above that of the other"),
        ("lr", "Learning rate", ""),
        ("tokens_per_second", "Throughput", "tokens a second"),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        points, beside = _points(metrics, key), _points(validation, key)
        note = "validation set dashed" if beside else ""
        if key == "lr" and planned:
            beside, note = [(step, lr) for step, lr in planned], "as planned before training dashed"
        if points:
            chart = line_chart(points, caption, "step", beside=beside, from_zero=key != "margin")
            charts.append(page.figure(caption, "; ".join(text for text in (unit, note) if text), chart))
    return f'<div class="charts">{"".join(charts)}</div>'


def _points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], float(record[key])) for record in records if record.get(key) is not None]


def _training_facts(manifest: Mapping[str, Any]) -> str:
    summary = (manifest.get("training") or {}).get("summary", {})
    values = {name.replace("_", " "): _counted(value) for name, value in summary.items()}
    half = (len(values) + 1) // 2
    first, second = dict(list(values.items())[:half]), dict(list(values.items())[half:])
    return f'<div class="columns spaced">{page.facts("Samples and steps", first)}{page.facts("", second)}</div>'


def _counted(value: Any) -> Any:
    return (
        f"{value:,}"
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) >= 1000
        else value
    )


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [
        (f"{stage['name']}", f"{stage.get('artifact') or ''}", float(stage["seconds"] or 0), _stage_time(stage))
        for stage in stages
    ]
    note = (
        '<p class="dim">A stage marked “reused” did not run this time; its time is that of the run that built it.</p>'
    )
    return page.bars(("stage", "artifact", "time"), rows) + note


def _stage_time(stage: Mapping[str, Any]) -> str:
    return seconds(float(stage["seconds"] or 0)) + (" (reused)" if stage.get("state") == "cached" else "")


def _data(dataset: Path) -> str:
    inspection = inspect_dataset(dataset, SAMPLES)
    return "<p>Trained tokens are <mark>marked</mark>; the others are context.</p>" + render_html(inspection)


def _verification(inputs: Mapping[str, Any]) -> str:
    blocks = []
    for role, title in (("checkpoint", "Conversion"), ("export", "Export")):
        try:
            certificate = read_certificate(Path(inputs[role]))
            told = facts(certificate) if certificate else {"level": NOT_VERIFIED}
        except CheckpointError as error:
            told = {"level": f"unknown: {error}"}
        blocks.append(page.facts(title, told))
    if changes := _read_json(Path(inputs["checkpoint"]) / "manifest.json").get("changes"):
        blocks.append(page.facts("Changed by the conversion", _changes(changes)))
    note = '<p class="dim">Read back from the files before they were published; each holds its certificate.json.</p>'
    return f'<div class="columns">{"".join(blocks)}</div>{note}'


def _changes(changes: Mapping[str, Any]) -> dict[str, str]:
    """What made another model of the source, for a person."""
    told = {}
    if changes["extra_vocab_size"]:
        told["extra vocabulary"] = f"{changes['extra_vocab_size']:,} rows, {changes['extra_vocab_init']}"
    if asked := changes["upcycle"]:
        noise = f" with noise of {asked['noise_std']:g}" if asked["noise_std"] else ""
        told["experts"] = f"{asked['num_experts']} a layer, copies of the dense MLP{noise}; {asked['topk']} a token"
        told["router"] = f"random, standard deviation {asked['router_init_std']:g}, seed {asked['seed']}"
        figures = changes["step_zero"]
        told["logits before training"] = (
            f"differ from the dense model's by {figures['max_difference']:.2g} at most "
            f"(largest {figures['max_logit']:.3g}), {figures['positions']:,} positions"
            if figures
            else "not compared with the dense model's"
        )
    return told


def _what_ran(
    inputs: Mapping[str, Any], config: Mapping[str, Any], manifest: Mapping[str, Any], results: Mapping[str, Any]
) -> str:
    blocks = [page.facts(f"recipe: {name}", values) for name, values in config.get("recipe", {}).items() if values]
    dataset = _read_json(Path(inputs["dataset"]) / "manifest.json")
    template = dataset.get("chat_template")
    given = {
        **_files(dataset),
        **(_validation_set(Path(inputs["validation"])) if "validation" in inputs else {}),
        "tokenizer": manifest["tokenizer_digest"],
        "chat template": f"{template['name']}, {template['digest']}" if template else "none: it is text",
        "weights": f"{manifest['dtype']}, {manifest['padded_vocab_size']:,} rows of the embedding on disk",
    }
    artifacts = {stage["name"]: stage["artifact"] for stage in config.get("stages", []) if stage.get("artifact")}
    versions = {**results["tuned"]["versions"], **config.get("versions", {})}
    versions |= {f"task {name}": version for name, version in versions.pop("tasks", {}).items()}
    blocks += [
        page.facts("inputs", given),
        page.facts("artifacts", artifacts),
        page.facts("versions", dict(sorted(versions.items()))),
    ]
    return f'<div class="columns">{"".join(blocks)}</div>'


def _files(dataset: Mapping[str, Any]) -> dict[str, str]:
    return {file["name"]: f"{file['rows']:,} rows, {file['digest']}" for file in dataset["files"]}


def _validation_set(place: Path) -> dict[str, str]:
    """Its size and its files, where it has files of its own."""
    dataset = _read_json(place / "manifest.json")
    size = {"validation set": f"{dataset['documents']:,} documents, {dataset['tokens']:,} tokens"}
    return size | {f"validation: {name}": told for name, told in _files(dataset).items()}


def seconds(value: float) -> str:
    """``8.2 s``, ``1 min 25 s``, ``2 h 05 min``."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


__all__ = ["read_metrics", "render", "run", "seconds"]
