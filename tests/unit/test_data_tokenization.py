"""Tokenizing whole files: the dataset folder, its manifest, what is refused, and a look into it."""

import io
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_data import chat, write_chat_tokenizer
from rich.console import Console
from tiny import write_jsonl
from tokenizers import Tokenizer

from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.inspection import decode_each, inspect_dataset, render_html, render_terminal
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.tokenization import run, tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ChatTemplateError, DatasetFormatError, DiskSpaceError, SourceError, VocabularyError
from megatron_ext.events import Events
from megatron_ext.worker import Job

ROWS = [{"messages": chat(f"question {n} 日本", f"answer {n} <b>🎉</b>")} for n in range(2500)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def tokenized(files, model, out, *, format="auto", chat_template="chatml", events=None):
    files = files if isinstance(files, list) else [files]
    return tokenize(files, model, out, format=format, chat_template=chat_template, events=events or Events())


def test_a_dataset_folder_holds_the_documents_in_order_with_a_mask_of_the_same_shape(tmp_path, model):
    other = [{"instruction": "Say", "input": "x", "output": "x x"}]
    files = [write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", other)]
    summary = tokenized(files, model, tmp_path / "out")
    tokens, mask = Idxmap(tmp_path / "out/tokens"), Idxmap(tmp_path / "out/loss_mask")
    tokenizer = load_tokenizer(model)

    def text(number, trained_only=False):
        ids = tokens[number][mask[number].astype(bool)] if trained_only else tokens[number]
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    assert len(tokens) == len(mask) == summary["documents"] == 2501
    assert tokens.lengths.tolist() == mask.lengths.tolist()
    for number in (0, 1023, 1024, 2047, 2048, 2499):
        user, assistant = ROWS[number]["messages"]
        answer = assistant["content"] + "<|im_end|>"
        prompt = f"<|im_start|>user\n{user['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert text(number) == prompt + answer + "\n"
        assert text(number, trained_only=True) == answer
    assert text(2500, trained_only=True) == "x x<|im_end|>"
    assert (tokens.dtype, mask.dtype) == (np.uint16, np.uint8)
    assert sorted(np.unique(mask.values).tolist()) == [0, 1]


def test_the_manifest_says_what_is_there(tmp_path, model):
    summary = tokenized(write_jsonl(tmp_path / "a.jsonl", ROWS), model, tmp_path / "out")
    manifest = DatasetManifest.read(tmp_path / "out")
    tokens, mask = Idxmap(tmp_path / "out/tokens"), Idxmap(tmp_path / "out/loss_mask")
    assert manifest.documents == 2500
    assert manifest.tokens == tokens.lengths.sum() == summary["tokens"]
    assert manifest.trained_tokens == mask.values.sum() == summary["trained_tokens"]
    assert manifest.max_token_id == tokens.values.max()
    assert manifest.vocab_size == load_tokenizer(model).get_vocab_size(with_added_tokens=True)
    assert (manifest.row_format, manifest.dtype, manifest.chat_template.name) == ("messages", "uint16", "chatml")
    assert manifest.why == "a.jsonl: all of the first 100 rows have a list messages of role and content"
    assert [(f.name, f.rows, f.format) for f in manifest.files] == [("a.jsonl", 2500, "messages")]
    lengths = manifest.lengths
    assert (lengths.min, lengths.max) == (tokens.lengths.min(), tokens.lengths.max())
    edges = [0, *(bar.up_to for bar in lengths.histogram)]
    assert [bar.documents for bar in lengths.histogram] == [
        int(((tokens.lengths > low) & (tokens.lengths <= high)).sum()) for low, high in pairwise(edges)
    ]
    raw = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (raw["format"], raw["version"], raw["kind"]) == ("megatron-flows/dataset", 1, "chat")


def test_bytes_depend_on_the_input_alone_and_not_on_leftovers(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "two").mkdir()
    for name in ("tokens.bin", "tokens.idx", "manifest.json"):
        (tmp_path / "two" / name).write_bytes(b"half of something" * 99)
    for out in ("one", "two"):
        tokenized(path, model, tmp_path / out)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two
    assert sorted(one) == [
        "loss_mask.bin", "loss_mask.idx", "manifest.json", "tokenizer.json", "tokens.bin", "tokens.idx",
    ]  # fmt: skip


def test_the_worker_runs_it_and_progress_is_told(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    events = tmp_path / "events.jsonl"
    job = Job(
        job="tokenize",
        config={"format": "messages", "chat_template": "llama3"},
        inputs={"files": [str(path)], "tokenizer": str(model)},
        out=tmp_path / "out",
    )
    assert run(job, Events(events))["chat_template"] == "llama3"
    told = [json.loads(line) for line in events.read_text().splitlines()]
    progress = [(e["done"], e["total"], e["unit"]) for e in told if e["event"] == "progress"]
    assert progress[0][0] == 0
    assert progress[-1] == (2500, 2500, "documents")
    last = next(e for e in reversed(told) if e["event"] == "progress")
    assert (last["tokens"], last["seconds_left"]) == (DatasetManifest.read(tmp_path / "out").tokens, 0)
    assert last["tokens_per_second"] > 0
    assert any("format messages was asked for" in e["text"] for e in told if e["event"] == "note")


def test_what_is_not_learned_is_said(tmp_path, model):
    def notes(text):
        (tmp_path / "t.jinja").write_text(text)
        (tmp_path / "events.jsonl").write_text("")
        with_template = str(tmp_path / "t.jinja")
        path = write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
        tokenized(path, model, tmp_path / "out", chat_template=with_template, events=Events(tmp_path / "events.jsonl"))
        told = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
        return " ".join(e["text"] for e in told if e["event"] == "note")

    turns = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    rest = "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert "no end marker" in notes(turns + "{% endgeneration %}" + rest)
    assert "leaves the end marker out" in notes(turns + "{% endgeneration %}</s>" + rest)
    assert "'<stop>' of chat template 't.jinja' is" in notes(turns + "<stop>{% endgeneration %}" + rest)
    assert "today's date" in notes("{{ strftime_now('%Y') }}" + turns + "</s>{% endgeneration %}" + rest)
    assert "chat template" not in notes(turns + "</s>{% endgeneration %}" + rest)


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_and_no_dataset_is_left(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"messages": "x"}])
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl, row 2501: field 'messages' is text, not a list"):
        tokenized(path, model, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_missing_file_is_found_before_the_first_one_is_read(tmp_path, model):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    with pytest.raises(SourceError, match=r"gone\.jsonl does not exist"):
        tokenized([broken, tmp_path / "gone.jsonl"], model, tmp_path / "out")


def test_a_row_that_the_template_refuses_is_named(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"messages": chat("a", "b", "c", "d")[1:]}])
    with pytest.raises(ChatTemplateError, match=r"a\.jsonl, row 2: .*'llama2' refuses"):
        tokenized(path, model, tmp_path / "out", chat_template="llama2")
    assert not (tmp_path / "out/manifest.json").exists()


def test_tools_need_a_template_that_has_a_place_for_them(tmp_path, model):
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    rows = [{"conversations": turns}, {"conversations": turns, "tools": '[{"name": "f"}]'}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DatasetFormatError, match=r"row 2: has tools.*'chatml'.*qwen2\.5"):
        tokenized(path, model, tmp_path / "out")
    assert tokenized(path, model, tmp_path / "out", chat_template="qwen2.5")["documents"] == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "every token"),
        ("{% generation %}{% endgeneration %}{{ messages[0].content }}", "no token"),
    ],
)
def test_a_mask_of_all_ones_or_all_zeros_is_refused(tmp_path, model, text, problem):
    (tmp_path / "t.jinja").write_text(text)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    tokenized(path, model, tmp_path / "out")  # what an attempt before this one left
    with pytest.raises(DatasetFormatError, match=f"{problem} of the 3 documents would be trained"):
        tokenized(path, model, tmp_path / "out", chat_template=str(tmp_path / "t.jinja"))
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_row_without_tokens_and_a_row_that_is_no_text_are_named(tmp_path, model):
    spoken = "{% if messages[0].content != 'silence' %}{{ messages[1].content }}{% endif %}"
    (tmp_path / "t.jinja").write_text("{% generation %}" + spoken + "{% endgeneration %}")
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], {"messages": chat("silence", "b")}])
    with pytest.raises(DatasetFormatError, match=r"row 2: renders to no tokens at all"):
        tokenized(path, model, tmp_path / "out", chat_template=str(tmp_path / "t.jinja"))
    path.write_text(json.dumps({"messages": chat("a", "\ud83d half")}))
    with pytest.raises(DatasetFormatError, match=r"row 1: holds half of a surrogate pair"):
        tokenized(path, model, tmp_path / "out")


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tmp_path):
    model = write_chat_tokenizer(tmp_path / "model")
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    size = load_tokenizer(model).get_vocab_size()
    (model / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(VocabularyError, match=f"id {size - 1}, but the model's vocab_size is {size - 1}"):
        tokenized(path, model, tmp_path / "out")
    (model / "config.json").write_text(json.dumps({"vocab_size": size}))
    assert tokenized(path, model, tmp_path / "out")["documents"] == 3


def test_a_tokenizer_that_is_missing_broken_or_incomplete_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(
        SourceError,
        match=r"has no tokenizer\.json and no tokenizer\.model, one of which tokenizing needs; make one with",
    ):
        tokenized(path, tmp_path, tmp_path / "out")
    model = write_chat_tokenizer(tmp_path / "model", added_tokens_decoder={"999": {"content": "<new>"}})
    with pytest.raises(VocabularyError, match="adds token '<new>' as id 999"):
        tokenized(path, model, tmp_path / "out")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json is not a readable tokenizer"):
        tokenized(path, model, tmp_path / "out")


def test_a_full_disk_is_refused_before_the_first_byte(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:3])
    free = os.statvfs(tmp_path)
    with path.open("ab") as file:  # sparse: it takes no room, but what it announces is larger than the disk
        file.truncate(2 * free.f_bavail * free.f_frsize)
    with pytest.raises(DiskSpaceError, match=r"the dataset needs .* GB free; free some space"):
        tokenized(path, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncation_in_the_tokenizer_file_is_ignored(tmp_path):
    model = write_chat_tokenizer(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(model / "tokenizer.json"))
    tokenized(write_jsonl(tmp_path / "a.jsonl", ROWS[:3]), model, tmp_path / "out")
    tokens = Idxmap(tmp_path / "out/tokens")
    assert load_tokenizer(model).decode(tokens[0].tolist()).count("answer 0") == 1


# --- a look into it ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("dataset")
    tokenized(write_jsonl(folder / "a.jsonl", ROWS[:30]), model, folder / "out")
    return folder / "out"


def test_samples_are_decoded_token_by_token_with_the_trained_ones_marked(dataset):
    inspection = inspect_dataset(dataset, 3)
    assert [sample.document for sample in inspection.samples] == [0, 10, 20]
    for sample in inspection.samples:
        answer = ROWS[sample.document]["messages"][1]["content"] + "<|im_end|>"
        assert "".join(t.text for t in sample.tokens if t.trained) == answer
        assert len(sample.tokens) == sample.length
        assert sample.trained == sum(t.trained for t in sample.tokens)
    values = json.loads(json.dumps(inspection.as_json()))
    assert values["trained_share"] == pytest.approx(values["trained_tokens"] / values["tokens"], abs=1e-6)
    assert len(inspect_dataset(dataset, 99).samples) == 30


@pytest.mark.parametrize("kind", ["bytes", "nfc", "metaspace"])
def test_decoding_each_token_gives_the_whole_text(tmp_path, kind):
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path, kind))
    text = "<|im_start|>user\n a 日本 👩‍👩‍👧 x\n\n<|im_end|>\nthe capital  of"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = decode_each(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)


def printed(dataset, **console):
    file = io.StringIO()
    render_terminal(inspect_dataset(dataset, 1), Console(file=file, width=100, **console))
    return file.getvalue()


def test_the_terminal_shows_trained_tokens_with_and_without_colour(dataset):
    plain = printed(dataset, color_system=None)
    assert "[[answer 0 <b>🎉</b><|im_end|>]]" in plain
    assert "30 documents" in plain
    coloured = printed(dataset, color_system="standard", force_terminal=True)
    assert "\x1b[1;32manswer 0 <b>🎉</b><|im_end|>\x1b[0m" in coloured
    assert "[[" not in coloured


def test_the_html_fragment_is_escaped_and_stands_alone(dataset):
    fragment = render_html(inspect_dataset(dataset, 2))
    assert "<mark>answer 0 &lt;b&gt;🎉&lt;/b&gt;&lt;|im_end|&gt;</mark>" in fragment
    assert "http" not in fragment
    assert "<b>" not in fragment


def test_a_folder_that_is_no_dataset_is_named(tmp_path, dataset):
    with pytest.raises(SourceError, match=r"gone is not a dataset: it does not exist; make one with `mflow tokenize`"):
        inspect_dataset(tmp_path / "gone", 1)
    with pytest.raises(SourceError, match=r"is not a dataset: it has no manifest\.json"):
        inspect_dataset(tmp_path, 1)
    (tmp_path / "manifest.json").write_text('{"format": "megatron-flows/checkpoint"}')
    with pytest.raises(SourceError, match="is not the manifest of a dataset"):
        inspect_dataset(tmp_path, 1)


def test_a_damaged_dataset_is_named(tmp_path, dataset):
    for path in dataset.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "loss_mask.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"loss_mask\.bin is truncated"):
        inspect_dataset(tmp_path, 1)


def test_tokenizing_imports_neither_torch_nor_transformers():
    import subprocess
    import sys

    code = (
        "import sys, megatron_ext.data.tokenization, megatron_ext.data.inspection;"
        "print([m for m in ('torch', 'transformers', 'megatron.core', 'pyarrow') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "[]"
