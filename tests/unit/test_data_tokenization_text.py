"""Text to idxmaps: end marks, long documents, rows left out, engines, shards, and builds that were killed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_data import write_chat_tokenizer
from tiny import write_jsonl

from megatron_ext.data import building, plan, text_work, tokenization
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError, DatasetFormatError, SourceError, VocabularyError
from megatron_ext.events import Events

ROOT = Path(__file__).parents[2]
draw = random.Random(3)
TEXTS = [
    " ".join(draw.choices(["capital", "of", "France", "is", "Paris", "日本", "🎉", "\n"], k=1 + n % 90))
    for n in range(3000)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and shards so small that little data has many, and the fast engine although it is little."""
    monkeypatch.setattr(text_work, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(text_work, "SHARD_BLOCKS", 3)
    monkeypatch.setattr(plan, "SMALL_BYTES", 0)


def written(files, model, out, **options):
    tokenize(files if isinstance(files, list) else [files], model, out, events=Events(), **options)
    return Idxmap(out / "tokens"), DatasetManifest.read(out)


def rows(path, texts):
    return write_jsonl(path, [{"text": text} for text in texts])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_text_becomes_its_tokens_with_no_mask_file(tmp_path, model):
    tokens, manifest = written(rows(tmp_path / "a.jsonl", TEXTS[:50]), model, tmp_path / "out")
    encoder = load_tokenizer(model)
    assert [tokens[n].tolist() for n in range(50)] == [e.ids for e in encoder.encode_batch(TEXTS[:50])]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "tokenizer.json", "tokens.bin", "tokens.idx",
    ]  # fmt: skip
    assert (manifest.kind, manifest.chat_template, manifest.trained_tokens) == ("text", None, manifest.tokens)
    assert manifest.engine.name == "tokenizers"
    assert "too little data" in manifest.engine.why


def test_the_manifest_counts_tokens_by_id(tmp_path, model):
    tokens, manifest = written(rows(tmp_path / "a.jsonl", TEXTS[:200]), model, tmp_path / "out")
    counts = np.bincount(tokens.values)
    histogram = manifest.histogram
    assert histogram.distinct == (counts > 0).sum()
    assert [(t.id, t.count) for t in histogram.top[:3]] == [
        (int(i), int(counts[i])) for i in np.argsort(-counts, kind="stable")[:3]
    ]
    assert sum(bar.tokens for bar in histogram.bars) == manifest.tokens
    assert sum(bar.ids for bar in histogram.bars) == histogram.distinct
    assert load_tokenizer(model).id_to_token(histogram.top[0].id) == histogram.top[0].token


# --- marks and lengths ------------------------------------------------------------------------------------------


def test_marks_are_put_on_once(tmp_path, model):
    texts = ["Paris", "Paris</s>", "<s>Paris", "<s>", ""]
    tokens, manifest = written(
        rows(tmp_path / "a.jsonl", texts), model, tmp_path / "out", append_eod=True, prepend_bos=True
    )
    encoder = load_tokenizer(model)
    paris = encoder.encode("Paris").ids
    bos, eod = encoder.token_to_id("<s>"), encoder.token_to_id("</s>")
    assert [tokens[n].tolist() for n in range(len(tokens))] == [[bos, *paris, eod]] * 3 + [[bos, eod]]
    assert (manifest.bos_id, manifest.eod_id, manifest.left_out.empty_rows) == (bos, eod, 1)


def test_a_mark_that_the_tokenizer_lacks_is_refused(tmp_path):
    model = write_chat_tokenizer(tmp_path / "model", eos_token=None)
    with pytest.raises(VocabularyError, match=r"append_eod needs it, but the tokenizer of .* names no eos_token"):
        written(rows(tmp_path / "a.jsonl", TEXTS[:3]), model, tmp_path / "out", append_eod=True)


def pieces(document, eod):
    """Of 32 tokens; the last token of a piece goes with an end mark that would be left alone."""
    bounds = list(range(0, len(document), 32))
    if eod and len(document) - bounds[-1] == 1 and len(bounds) > 1:
        bounds[-1] -= 1
    return [document[a:b] for a, b in zip(bounds, [*bounds[1:], len(document)], strict=True)]


@pytest.mark.parametrize("eod", [True, False])
def test_long_documents_are_cut_dropped_or_split(tmp_path, model, eod):
    path = rows(tmp_path / "a.jsonl", TEXTS[:100])
    whole, _ = written(path, model, tmp_path / "whole", append_eod=eod)
    documents = [whole[n].tolist() for n in range(len(whole))]
    long = [document for document in documents if len(document) > 32]
    kept = {
        "drop": [document for document in documents if len(document) <= 32],
        "split": [piece for document in documents for piece in pieces(document, eod)],
        "truncate": [d if len(d) <= 32 else d[:31] + d[-1:] if eod else d[:32] for d in documents],
    }
    for overlong, expected in kept.items():
        out = tmp_path / overlong
        tokens, manifest = written(path, model, out, append_eod=eod, max_length=32, overlong=overlong)
        assert [tokens[n].tolist() for n in range(len(tokens))] == expected, overlong
        left = manifest.left_out
        assert (left.dropped, left.truncated, left.split) == tuple(
            len(long) if overlong == name else 0 for name in ("drop", "truncate", "split")
        )
        assert left.truncated_tokens == (sum(map(len, long)) - 32 * len(long) if overlong == "truncate" else 0)


def test_conversations_are_not_split(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(ConfigError, match="overlong split is for text"):
        written(path, model, tmp_path / "out", chat_template="chatml", max_length=8, overlong="split")


# --- rows that are left out -------------------------------------------------------------------------------------


def test_bad_rows_are_errors_or_are_counted(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"txt": "b"}, {"text": 3}, {"text": ""}, {"text": "c"}])
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n{"text": "\\ud800"}\n{"text": "d"')
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl, row 2: field 'text' is missing"):
        written(path, model, tmp_path / "out", format="text")
    assert not list((tmp_path / "out").iterdir())
    tokens, manifest = written(path, model, tmp_path / "out", format="text", on_bad_row="skip")
    left = manifest.left_out
    assert (len(tokens), left.skipped_rows, left.empty_rows) == (2, 5, 1)
    assert len(left.first_skipped) == 5
    assert "row 3: field 'text' is a number, not text" in left.first_skipped[1]
    assert [file.rows for file in manifest.files] == [8]


def test_nothing_left_is_an_error(tmp_path, model):
    with pytest.raises(DatasetFormatError, match="no document is left of 2 rows: 0 skipped, 2 empty"):
        written(rows(tmp_path / "a.jsonl", ["", ""]), model, tmp_path / "out")


def test_text_and_conversations_do_not_mix(tmp_path, model):
    files = [
        rows(tmp_path / "a.jsonl", ["x"]),
        write_jsonl(tmp_path / "b.jsonl", [{"instruction": "a", "output": "b"}]),
    ]
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl is text data, but .*b\.jsonl is chat data"):
        written(files, model, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, model, monkeypatch):
    path = rows(tmp_path / "a.jsonl", TEXTS[:50])
    check = tokenization.require_exact
    monkeypatch.setattr(tokenization, "require_exact", lambda *given: (os.utime(path, (1, 1)), check(*given)))
    with pytest.raises(SourceError, match=r"a\.jsonl changed while it was read"):
        written(path, model, tmp_path / "out")


# --- engines and workers ----------------------------------------------------------------------------------------


def test_any_engine_and_any_number_of_workers_give_the_same_bytes(tmp_path, model, small_blocks, monkeypatch):
    files = [rows(tmp_path / "a.jsonl", TEXTS), rows(tmp_path / "b.jsonl", [*TEXTS[:70], "", "</s>"])]
    options = {"append_eod": True, "max_length": 64}
    for workers in (1, 2, 5):
        written(files, model, tmp_path / f"{workers}", workers=workers, **options)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2") == bytes_of(tmp_path / "5")
    engine = DatasetManifest.read(tmp_path / "1").engine
    assert engine.name == "gigatoken"
    assert engine.stress_texts > 80_000
    assert engine.compared_documents >= 30
    assert "the other documents were not compared" in engine.why
    monkeypatch.setattr(plan, "SMALL_BYTES", 1 << 30)
    written(files, model, tmp_path / "reference", **options)
    for name in ("tokens.bin", "tokens.idx"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_an_engine_that_differs_on_the_data_is_replaced_and_that_is_told(tmp_path, model, small_blocks, monkeypatch):
    path = rows(tmp_path / "a.jsonl", TEXTS)
    encode = building.GigatokenEngine.encode

    def wrong(self, texts):
        ids = encode(self, texts)
        if texts.count and "🎉" in texts.string(texts.count - 1):
            return ids._replace(values=ids.values[::-1])
        return ids

    monkeypatch.setattr(building.GigatokenEngine, "encode", wrong)
    tokenize([path], model, tmp_path / "out", events=Events(tmp_path / "events.jsonl"))
    manifest = DatasetManifest.read(tmp_path / "out")
    assert manifest.engine.name == "tokenizers"
    assert "gigatoken is not exact here: " in manifest.engine.why
    assert "a.jsonl, row " in manifest.engine.why
    assert "takes longer" in (tmp_path / "events.jsonl").read_text()
    tokens = Idxmap(tmp_path / "out/tokens")
    expected = load_tokenizer(model).encode_batch(TEXTS)
    assert [tokens[n].tolist() for n in range(len(TEXTS))] == [e.ids for e in expected]


def test_weights_and_files_are_recorded(tmp_path, model):
    folder = tmp_path / "many"
    folder.mkdir()
    for name, part in (("b", TEXTS[:5]), ("a", TEXTS[5:9])):
        rows(folder / f"{name}.jsonl", part)
    single = rows(tmp_path / "one.jsonl", TEXTS[9:11])
    _, manifest = written([f"0.7:{folder}", f"3:{single}"], model, tmp_path / "out")
    assert [(f.name, f.weight, f.documents) for f in manifest.files] == [
        ("a.jsonl", 0.7, 4), ("b.jsonl", 0.7, 5), ("one.jsonl", 3.0, 2),
    ]  # fmt: skip
    assert manifest.files[0].input == manifest.files[1].input == f"0.7:{folder}"


# --- kill and go on ---------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from megatron_ext.data import plan, shards, text_work, tokenization
from megatron_ext.events import Events
text_work.BLOCK_BYTES, text_work.SHARD_BLOCKS, plan.SMALL_BYTES = 1 << 13, 3, 0
finish = shards.Shards.finish_shard
def slowly(self, *given):
    finish(self, *given)
    if len((self.out / shards.JOURNAL).read_bytes().splitlines()) > 4:
        print("ready", flush=True)
        time.sleep(600)
shards.Shards.finish_shard = slowly
tokenization.tokenize([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), events=Events(), workers=2, append_eod=True)
"""


def killed(path, model, out):
    command = [sys.executable, "-c", SLOW, str(path), str(model), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("damage", ["", "journal", "tokens", "tail"])
def test_a_killed_build_goes_on_at_the_last_whole_shard(tmp_path, model, small_blocks, damage, monkeypatch):
    path = rows(tmp_path / "a.jsonl", [*TEXTS, "", "last"])
    written(path, model, tmp_path / "whole", workers=1, append_eod=True)
    out = tmp_path / "out"
    killed(path, model, out)
    assert not (out / "manifest.json").exists()
    lines = (out / "shards.jsonl").read_text().splitlines()
    if damage == "journal":
        (out / "shards.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    elif damage == "tokens":
        with (out / "tokens.bin").open("r+b") as file:
            file.seek(json.loads(lines[2])["sizes"]["tokens.bin"] + 5)
            file.write(b"\xff")
    elif damage == "tail":
        with (out / "tokens.bin").open("ab") as file:
            file.write(b"half a shard")
    begun = []
    blocks = text_work.text_blocks
    monkeypatch.setattr(text_work, "text_blocks", lambda s, c, p, **o: (begun.append(p), blocks(s, c, p, **o))[1])
    written(path, model, out, workers=3, append_eod=True)
    kept = json.loads(lines[2 if damage in ("journal", "tokens") else 4])
    assert begun == [(kept["source"], kept["row"])]
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_leftovers_of_other_options_are_not_gone_on_with(tmp_path, model, small_blocks):
    path = rows(tmp_path / "a.jsonl", TEXTS)
    killed(path, model, tmp_path / "out")
    written(path, model, tmp_path / "out", append_eod=False)
    written(path, model, tmp_path / "whole", append_eod=False)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# --- memory and start -------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from pathlib import Path
import awkward, gigatoken, pyarrow.json
from megatron_ext.data import tokenization
from megatron_ext.events import Events
programs = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (programs + int(sys.argv[4]),) * 2)
tokenization.tokenize([sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3]), events=Events(), workers=1)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited as Linux does it")
def test_a_corpus_far_larger_than_the_memory_is_tokenized(tmp_path, model):
    import pyarrow

    memory = 256 << 20
    line = json.dumps({"text": "the capital of France is Paris. " * 3200}).encode() + b"\n"  # 100 kB
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        for _ in range(100):
            file.write(line * 70)
    # without these, glibc and Arrow reserve address space that they never use
    thrifty = {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "a.jsonl.zst", model, tmp_path / "out", str(memory)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | thrifty,
    )  # fmt: skip
    assert result.stdout == "done\n", result.stderr[-2000:]
    manifest = DatasetManifest.read(tmp_path / "out")
    assert manifest.documents == 7000
    assert (tmp_path / "out/tokens.bin").stat().st_size > memory


def test_the_command_imports_neither_torch_nor_transformers(tmp_path, model):
    path = rows(tmp_path / "a.jsonl", TEXTS[:20])
    code = (
        "import sys; from megatron_ext.data import plan; plan.SMALL_BYTES = 0;"
        "from megatron_ext.cli import app;"
        f"app(['tokenize', '--input', {str(path)!r}, '--tokenizer', {str(model)!r},"
        f"'--out', {str(tmp_path / 'out')!r}], standalone_mode=False);"
        "print([m for m in ('torch', 'transformers', 'megatron.core', 'prefect', 'pandas') if m in sys.modules],"
        "'gigatoken' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[] True"
