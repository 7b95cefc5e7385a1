"""The report: self-contained, escaped, the same bytes for the same run, and true to the files it is made from."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import write_jsonl, write_model

from megatron_ext.data.tokenization import tokenize
from megatron_ext.errors import SourceError
from megatron_ext.events import Events
from megatron_ext.report import render, seconds
from megatron_ext.report.charts import MOST_POINTS, line_chart, short, thinned, ticks
from megatron_ext.weights.convert import convert

HOSTILE = "<script>alert('x')</script> & <img src=http://example.com/a.png>"
RECIPE = {
    "model": {"path": f"./{HOSTILE}", "dtype": None},
    "data": {"files": ["chat.jsonl"]},
    "train": {"lr": 0.001, "train_iters": 700, "seq_length": 64},
    "evaluate": {"tasks": ["own"]},
    "runtime": {"nproc_per_node": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's folders: real model, conversion and dataset; metrics and scores as the stages write them."""
    place = tmp_path_factory.mktemp("run")
    model = write_model(place / "model", num_hidden_layers=1)
    turns = [{"role": "user", "content": f"2 < 3? {HOSTILE}"}, {"role": "assistant", "content": "Yes & yes"}]
    write_jsonl(place / "chat.jsonl", [{"messages": turns}] * 6)
    for name in ("checkpoint", "dataset", "training", "export", "base", "tuned"):
        (place / name).mkdir()
    convert(model, place / "checkpoint", dtype=None, verify="digest", events=Events())
    files = [place / "chat.jsonl"]
    tokenize(files, model, place / "dataset", format="auto", chat_template=None, events=Events())
    manifest = json.loads((place / "checkpoint" / "manifest.json").read_text())
    summary = {"samples": 6, "truncated": 3, "dropped_overlong": 17, "tokens_per_second": 4321.0, "seconds": 85.4}
    manifest |= {"iteration": 700, "training": {"train": RECIPE["train"], "summary": summary}}
    (place / "training" / "manifest.json").write_text(json.dumps(manifest))
    write_jsonl(
        place / "training" / "metrics.jsonl",
        [
            {
                "step": s,
                "loss": 6 / s,
                "lr": 1e-3 / s,
                "grad_norm": 1.0,
                "tokens_per_second": 4000.0 + s,
                "sample_ids": [1],
            }
            for s in range(1, 701)
        ],
    )
    for name, value in (("base", 0.25), ("tuned", 0.9375)):
        results = {
            "model": name, "tasks": {"own": {"acc": value, "acc_stderr": 0.01}}, "num_documents": {"own": 320},
            "versions": {"lm_eval": "0.4.13", "tasks": {"own": 1.0}}, "seconds": 9.0,
        }  # fmt: skip
        (place / name / "results.json").write_text(json.dumps(results))
    return place


@pytest.fixture
def inputs(folders):
    roles = {role: str(folders / role) for role in ("training", "dataset", "checkpoint", "export")}
    evaluations = {"base": str(folders / "base"), "tuned": str(folders / "tuned")}
    return {**roles, "tokenizer": str(folders / "model"), "evaluations": evaluations}


CONFIG = {
    "recipe": RECIPE,
    "versions": {"prefect": "3.8.8"},
    "stages": [
        {"name": "train-model", "seconds": 92.3, "artifact": "trainings/abc123", "state": "built"},
        {"name": "evaluate-base", "seconds": 14.0, "artifact": "reports/def456", "state": "cached"},
    ],
}


class Page(HTMLParser):
    """What a browser would make of it: tags with attributes, and text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._style = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._style = tag == "style"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if not self._style:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_nothing_outside_the_file_is_referred_to_and_no_data_becomes_markup(inputs):
    text = render(inputs, CONFIG)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "onload", "onclick"} & set(attributes), tag
    assert "@import" not in text
    assert "url(" not in text
    assert HOSTILE in page.text, "the data is shown as it is"


def test_scores_curves_samples_stages_and_counts_are_on_the_page(inputs):
    page = Page(render(inputs, CONFIG))
    for shown in (
        "0.250 ± 0.010", "0.938 ± 0.010", "+0.688 ± 0.014", "train-model", "1 min 32 s", "14.0 s (reused)",
        "trainings/abc123", "truncated 3", "dropped overlong 17", "prefect 3.8.8", "lm_eval 0.4.13", "4,321", "6 rows",
    ):  # fmt: skip
        assert shown in page.text, shown
    charts = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert charts == ["Loss", "Learning rate", "Throughput", "Gradient norm"]


def test_the_trained_tokens_of_a_sample_are_marked_and_only_they(inputs):
    marked = re.findall(r"<mark>(.*?)</mark>", render(inputs, CONFIG))
    assert marked.count("Yes &amp; yes&lt;|im_end|&gt;") == 4
    assert set(marked) == {"marked", "Yes &amp; yes&lt;|im_end|&gt;"}


def test_a_validation_set_of_its_own_files_is_named(inputs, folders):
    assert "validation set" not in Page(render(inputs, CONFIG)).text
    shown = Page(render({**inputs, "validation": str(folders / "dataset")}, CONFIG)).text
    assert re.search(r"validation set 6 documents, \d+ tokens validation: chat\.jsonl 6 rows", shown)


def test_what_was_verified_is_said_and_what_was_not_too(inputs, folders):
    shown = Page(render(inputs, CONFIG)).text
    certificate = json.loads((folders / "checkpoint" / "certificate.json").read_text())
    assert f"{certificate['tensors']} of Hugging Face" in shown
    assert f"{certificate['bytes']:,}, bit for bit in fp32" in shown
    assert "Export level none: it was not compared" in shown


def test_a_damaged_certificate_is_said_and_costs_only_its_own_figures(inputs, folders, tmp_path):
    damaged = Path(shutil.copytree(folders / "checkpoint", tmp_path / "checkpoint"))
    (damaged / "certificate.json").write_text('{"level": "dig')
    shown = Page(render({**inputs, "checkpoint": str(damaged)}, CONFIG)).text
    assert re.search(r"Conversion level unknown: .*certificate\.json is no certificate: file: Invalid JSON", shown)


def test_the_same_run_gives_the_same_bytes(inputs):
    assert render(inputs, CONFIG) == render(inputs, CONFIG)


def test_without_a_baseline_only_the_tuned_score_is_shown(inputs):
    inputs["evaluations"].pop("base")
    page = Page(render(inputs, CONFIG))
    assert "0.938 ± 0.010" in page.text
    assert "difference" not in page.text


def test_a_small_difference_is_not_called_better(inputs, folders, tmp_path):
    results = json.loads((folders / "base" / "results.json").read_text())
    results["tasks"]["own"]["acc"] = 0.93
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert 'class="number better"' in render(inputs, CONFIG)
    inputs["evaluations"]["base"] = str(tmp_path)
    assert 'class="number better"' not in render(inputs, CONFIG)


def test_a_training_without_metrics_is_refused_by_name(inputs, folders, tmp_path):
    (tmp_path / "manifest.json").write_text((folders / "training" / "manifest.json").read_text())
    inputs["training"] = str(tmp_path)
    with pytest.raises(SourceError, match=r"metrics\.jsonl does not exist"):
        render(inputs, CONFIG)


def test_the_report_is_written_by_its_job_without_importing_torch(inputs, tmp_path):
    job = {"job": "report", "config": CONFIG, "inputs": inputs, "out": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    code = (
        "import sys; from megatron_ext.worker import main; code = main();"
        "sys.exit(code or 10 * ('torch' in sys.modules) + 20 * ('matplotlib' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "job.json")], check=True)
    assert (tmp_path / "report.html").read_text() == render(inputs, CONFIG)


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_point():
    points = [(float(i), float(i % 2)) for i in range(1, 10_001)]
    shown = thinned(points)
    assert len(shown) == MOST_POINTS
    assert shown[-1] == points[-1]
    assert all(0.4 < y < 0.6 for _, y in shown[:-1])


@pytest.mark.parametrize("points", [[], [(1, 2.0)], [(1, 3.0), (2, 3.0)], [(1, 1.0), (2, float("nan")), (3, 0.5)]])
def test_charts_of_few_flat_or_broken_values_are_still_charts(points):
    chart = line_chart(points, "Loss", "step")
    assert "nan" not in chart
    assert ("<svg" in chart) == bool(points)


def test_ticks_are_round_and_cover_the_values():
    assert ticks(0, 6.9) == [0, 2, 4, 6, 8]
    assert ticks(0, 0.001) == [0, 0.0005, 0.001]
    assert ticks(5, 5)[0] < 5 < ticks(5, 5)[-1]
    assert [short(v) for v in (0, 0.0005, 0.25, 8, 12_000, 3e6)] == ["0", "5e-4", "0.25", "8", "12k", "3M"]


def test_durations_read_as_people_say_them():
    assert [seconds(s) for s in (8.24, 85.4, 7500)] == ["8.2 s", "1 min 25 s", "2 h 05 min"]
