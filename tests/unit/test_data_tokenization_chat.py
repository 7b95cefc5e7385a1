"""Conversations and preferences to idxmaps: in processes, by the fast engine, with rows left out; real data."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from chat_data import chat, write_chat_tokenizer
from real_data import REAL_DATA, needs_real_data
from tiny import write_jsonl

from megatron_ext.data import chat_work, plan
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ChatTemplateError, DatasetFormatError, UserError
from megatron_ext.events import Events

ROOT = Path(__file__).parents[2]
ROWS = [{"messages": chat(f"question {n} 日本", f"answer {n} e\u0301 🎉", "more", f"Paris {n}")} for n in range(900)]
PAIRS = [
    {
        "prompt": f"question {n}",
        "chosen": [{"role": "assistant", "content": f"good {n} " * (1 + n % 9)}],
        "rejected": [{"role": "assistant", "content": "bad " * (1 + n % 7)}],
    }
    for n in range(300)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"), "nfc")


@pytest.fixture
def fast(monkeypatch):
    """The fast engine and processes, although there is little data, in small shards."""
    monkeypatch.setattr(plan, "SMALL_BYTES", 0)
    monkeypatch.setattr(plan, "ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr(chat_work, "BLOCK_ROWS", 100)
    monkeypatch.setattr(chat_work, "SHARD_BLOCKS", 2)


def written(path, model, out, **options):
    options = {"chat_template": "chatml"} | options
    tokenize([path], model, out, events=Events(), **options)
    return DatasetManifest.read(out)


def bytes_of(folder, *left_out):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in left_out}


def texts(folder, model, name="tokens", mask=None):
    """Every document decoded; with a mask its trained tokens alone."""
    tokens, encoder = Idxmap(folder / name), load_tokenizer(model)
    masks = Idxmap(folder / mask) if mask else None
    return [
        encoder.decode((tokens[n] if masks is None else tokens[n][masks[n] == 1]).tolist(), skip_special_tokens=False)
        for n in range(len(tokens))
    ]


def test_processes_and_engines_give_the_same_bytes(tmp_path, model, fast, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    for workers in (1, 2):
        written(path, model, tmp_path / f"{workers}", workers=workers)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")
    monkeypatch.setattr(plan, "ONE_PROCESS_BYTES", 1 << 30)  # two threads share an encoder
    written(path, model, tmp_path / "threads", workers=2)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "threads")
    monkeypatch.setattr(plan, "SMALL_BYTES", 1 << 30)
    written(path, model, tmp_path / "reference")
    manifest = "manifest.json"
    assert bytes_of(tmp_path / "1", manifest) == bytes_of(tmp_path / "reference", manifest)
    engines = [DatasetManifest.read(tmp_path / name).engine for name in ("1", "reference")]
    assert [engine.name for engine in engines] == ["gigatoken", "tokenizers"]
    assert engines[0].compared_documents >= 100


def test_a_row_that_does_not_fit_is_named_by_any_process(tmp_path, model, fast):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:450], {"messages": "x"}, *ROWS[:300]])
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl, row 451: field 'messages' is text, not a list"):
        written(path, model, tmp_path / "out", workers=2)
    bad = {"messages": chat("a", "b", "c", "d")[1:]}
    path = write_jsonl(tmp_path / "b.jsonl", [*ROWS[:250], bad])
    with pytest.raises(ChatTemplateError, match=r"b\.jsonl, row 251: .*'llama2' refuses"):
        written(path, model, tmp_path / "out", workers=2, chat_template="llama2")


@pytest.mark.parametrize(
    ("row", "template", "problem"),
    [
        ({"messages": [{"role": "user", "content": 3}]}, "chatml", "field 'messages[0].content' is a number"),
        ({"messages": chat("a", "b"), "tools": "[" * 100_000}, "chatml", "field 'tools' is not valid JSON"),
        ({"messages": chat("a", "b"), "tools": '[{"name": "f"}]'}, "chatml", "has tools"),
        ({"messages": chat("a", "\ud83d half")}, "chatml", "holds half of a surrogate pair"),
        ({"messages": chat("a", "b")[1:]}, "llama2", "chat template 'llama2' refuses the conversation"),
        ({"messages": chat("a", "b")}, "{% generation %}{% endgeneration %}", "renders to no tokens at all"),
        ({"messages": chat("a", "b")}, "{{ messages[0].content * 2 }}", "its place in the text cannot be found"),
        ({"messages": chat("a", "b")}, "{{ cycler().next() }}", "at least one item"),
    ],
)
def test_whatever_is_wrong_with_a_row_is_a_users_error_with_file_and_row(row, template, problem, tmp_path, model):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if "{" in template:
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}, row 1: .*{re.escape(problem)}"):
        written(path, model, tmp_path / "out", format="messages", chat_template=template)


def test_rows_that_do_not_fit_are_skipped_and_counted(tmp_path, model):
    bad = [
        {"messages": "x"},
        {"messages": chat("a", "\ud83d half")},
        {"messages": chat("a", "b"), "tools": '[{"name": "f"}]'},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0], *bad, ROWS[1]]) + "{\n")
    manifest = written(path, model, tmp_path / "out", on_bad_row="skip")
    assert (manifest.documents, manifest.left_out.skipped_rows, manifest.files[0].rows) == (2, 4, 6)
    said = " ".join(manifest.left_out.first_skipped)
    for number, reason in (
        (2, "is text, not a list"),
        (3, "half of a surrogate"),
        (4, "has tools"),
        (6, "not valid JSON"),
    ):
        assert f"row {number}: " in said
        assert reason in said


def test_which_turns_are_trained(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    trained = {}
    for name in ("", "last_turn_only", "train_on_prompt"):
        written(path, model, tmp_path / f"out{name}", **({name: True} if name else {}))
        trained[name] = texts(tmp_path / f"out{name}", model, mask="loss_mask")[1]
    assert trained[""] == "answer 1 é 🎉<|im_end|>Paris 1<|im_end|>"
    assert trained["last_turn_only"] == "Paris 1<|im_end|>"
    assert trained["train_on_prompt"] == texts(tmp_path / "out", model)[1]


def test_the_end_of_a_conversation_is_trained_unless_it_was_cut_off(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}, {"messages": chat("q", "a " * 99)}])
    manifest = written(path, model, tmp_path / "out", append_eod=True, max_length=60)
    whole, cut = texts(tmp_path / "out", model)
    trained = texts(tmp_path / "out", model, mask="loss_mask")
    assert whole.endswith("a<|im_end|>\n</s>")
    assert trained[0] == "a<|im_end|></s>"
    assert cut.endswith(" a a")
    assert (manifest.left_out.truncated, manifest.lengths.max) == (1, 60)


# --- preferences ------------------------------------------------------------------------------------------------


def test_chosen_and_rejected_stay_together(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    manifest = written(path, model, tmp_path / "out")
    assert sorted(bytes_of(tmp_path / "out")) == sorted(
        ["manifest.json", "tokenizer.json"]
        + [
            f"{side}_{what}.{suffix}"
            for side in ("chosen", "rejected")
            for what in ("tokens", "loss_mask")
            for suffix in ("bin", "idx")
        ]
    )
    for side in ("chosen", "rejected"):
        assert texts(tmp_path / "out", model, f"{side}_tokens") == [
            f"<|im_start|>user\n{pair['prompt']}<|im_end|>\n<|im_start|>assistant\n{pair[side][0]['content']}<|im_end|>\n"
            for pair in PAIRS
        ]
        assert texts(tmp_path / "out", model, f"{side}_tokens", f"{side}_loss_mask") == [
            f"{pair[side][0]['content']}<|im_end|>" for pair in PAIRS
        ]
    assert (manifest.kind, manifest.documents) == ("preference", 300)
    assert manifest.tokens == sum(side.tokens for side in manifest.sides.values())
    assert manifest.trained_tokens == sum(side.trained_tokens for side in manifest.sides.values())


def test_a_pair_is_dropped_when_either_answer_is_too_long(tmp_path, model, fast):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    manifest = written(path, model, tmp_path / "out", max_length=60, overlong="drop", workers=1)
    chosen, rejected = Idxmap(tmp_path / "out/chosen_tokens"), Idxmap(tmp_path / "out/rejected_tokens")
    assert len(chosen) == len(rejected) == manifest.documents == 300 - manifest.left_out.dropped
    assert max(chosen.lengths.max(), rejected.lengths.max()) <= 60
    assert 0 < manifest.left_out.dropped < 300
    written(path, model, tmp_path / "whole", workers=1)
    lengths = [Idxmap(tmp_path / f"whole/{side}_tokens").lengths for side in ("chosen", "rejected")]
    assert manifest.left_out.dropped == int((np.maximum(*lengths) > 60).sum())


# --- killed ------------------------------------------------------------------------------------------------------

WAITING = """
import sys, time
from pathlib import Path
from megatron_ext.data import chat_work, plan, shards, tokenization
from megatron_ext.events import Events
if __name__ == "__main__":
    chat_work.BLOCK_ROWS, chat_work.SHARD_BLOCKS, plan.SMALL_BYTES, plan.ONE_PROCESS_BYTES = 100, 2, 0, 0
    finish = shards.Shards.finish_shard
    def slowly(self, *given):
        finish(self, *given)
        print("ready", flush=True)
        time.sleep(600)
    shards.Shards.finish_shard = slowly
    files, model, out = [sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    tokenization.tokenize(files, model, out, events=Events(), workers=2, chat_template="chatml")
"""


def test_a_killed_build_leaves_no_process_and_goes_on(tmp_path, model, fast):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    command = [sys.executable, script, path, model, tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=None) as process:
        assert process.stdout.readline().strip() == "ready"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert len((tmp_path / "out/shards.jsonl").read_text().splitlines()) == 2
    written(path, model, tmp_path / "out", workers=1)
    written(path, model, tmp_path / "whole", workers=2)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_templates_that_write_the_time_write_that_of_the_first_attempt(tmp_path, model, fast, monkeypatch):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:500])
    finish = chat_work.ChatWorker.work

    def stops(self, block):
        if block.row > 300:
            raise KeyboardInterrupt
        return finish(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(chat_work.ChatWorker, "work", stops)
        with pytest.raises(KeyboardInterrupt):
            written(path, model, tmp_path / "out", workers=1, chat_template=str(template))
    time.sleep(0.01)
    written(path, model, tmp_path / "out", workers=1, chat_template=str(template))
    moments = {text.partition("question")[0] for text in texts(tmp_path / "out", model)}
    assert len(moments) == 1


# --- real data --------------------------------------------------------------------------------------------------


@needs_real_data
@pytest.mark.parametrize(
    ("name", "kind", "format", "documents"),
    [
        ("alpaca_en_demo.json", "chat", "alpaca", 999),
        ("alpaca_zh_demo.json", "chat", "alpaca", 1000),
        ("glaive_toolcall_en_demo.json", "chat", "sharegpt", 300),
        ("autoalign_dummy_sft.json", "chat", "sharegpt", None),
        ("autoalign_dummy_dpo.json", "preference", "preference", None),
        ("dpo_en_demo.json", "preference", "preference", 300),
        ("c4_demo.jsonl", "text", "text", 300),
        ("wiki_demo.txt", "text", "text", 30),
        ("tinyshakespeare.txt", "text", "text", None),
    ],
)
def test_real_data_becomes_the_same_ids_by_either_engine(tmp_path, model, name, kind, format, documents, monkeypatch):
    path = REAL_DATA / name
    fitting = {"chat_template": "qwen2.5"}
    reference = written(path, model, tmp_path / "reference", **fitting)
    monkeypatch.setattr(plan, "SMALL_BYTES", 0)
    manifest = written(path, model, tmp_path / "out", workers=1, **fitting)
    assert (manifest.kind, manifest.row_format, manifest.engine.name) == (kind, format, "gigatoken")
    assert documents in (None, manifest.documents)
    left_out = "manifest.json"
    assert bytes_of(tmp_path / "out", left_out) == bytes_of(tmp_path / "reference", left_out)
    assert reference.engine.name == "tokenizers"


def test_turns_in_cells_of_a_csv_are_turns(tmp_path, model):
    import csv

    turns = [{"from": "human", "value": 'a "quoted", word'}, {"from": "gpt", "value": "yes\nindeed"}]
    rows = [
        {"prompt": "x", "chosen": turns[1:], "rejected": "[1, 2]"},
        {"prompt": turns[:1], "chosen": "b", "rejected": "c"},
    ]
    listed = write_jsonl(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    for path in (listed, tmp_path / "a.csv"):
        tokenize(
            [path], model, tmp_path / path.suffix[1:], events=Events(), format="preference", chat_template="chatml"
        )
    for name in ("chosen_tokens.bin", "rejected_tokens.bin", "chosen_loss_mask.bin"):
        assert (tmp_path / "csv" / name).read_bytes() == (tmp_path / "jsonl" / name).read_bytes()
