"""What an error leaves to the next attempt: every shard that is finished, by the library, the command and a stage."""

import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_data import chat, write_chat_tokenizer
from tiny import write_jsonl
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.data import plan, text_work
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.sources import opening
from megatron_ext.data.tokenization import tokenize
from megatron_ext.errors import DatasetFormatError, DiskSpaceError, SourceError
from megatron_ext.events import Events

TEXTS = [f"document {n} " * (1 + n % 40) for n in range(2000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_work, "BLOCK_BYTES", 1 << 13)
    monkeypatch.setattr(text_work, "SHARD_BLOCKS", 3)
    monkeypatch.setattr(plan, "SMALL_BYTES", 0)


@pytest.fixture
def begun(monkeypatch):
    """Where each build began: source and row."""
    positions, blocks = [], text_work.text_blocks
    monkeypatch.setattr(text_work, "text_blocks", lambda s, c, p, **o: (positions.append(p), blocks(s, c, p, **o))[1])
    return positions


def rows(path, texts):
    return write_jsonl(path, [{"text": text} for text in texts])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def command(*arguments):
    return CliRunner().invoke(app, ["tokenize", *map(str, arguments)])


class Broken:
    """A stream whose connection breaks."""

    def __init__(self, stream, after):
        self.stream, self.left = stream, after

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def read(self, *size):
        self.left -= 1
        if self.left < 0:
            raise OSError(104, "Connection reset by peer")
        return self.stream.read(*size)


def test_a_read_error_keeps_the_finished_shards_and_says_so(tmp_path, model, small_blocks, begun, monkeypatch):
    path, out = rows(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    opened = opening._open_stored
    with monkeypatch.context() as patched:

        @contextmanager
        def breaking(source):
            with opened(source) as stream:
                yield Broken(stream, 40)

        patched.setattr(opening, "_open_stored", breaking)
        with pytest.raises(
            SourceError, match=r"Connection reset by peer \(the first [\d,]+ rows are tokenized and kept"
        ):
            tokenize([path], model, out, events=Events(), format="text")
    last = json.loads((out / "shards.jsonl").read_text().splitlines()[-1])
    tokenize([path], model, out, events=Events(), format="text")
    assert begun[-1] == (0, last["row"])
    tokenize([path], model, tmp_path / "whole", events=Events(), format="text")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_rows_that_were_skipped_at_the_end_of_a_shard_are_not_counted_again(
    tmp_path, model, small_blocks, monkeypatch, kind
):
    if kind == "text":
        first = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 3}])
        second, options = rows(tmp_path / "b.jsonl", TEXTS), {"format": "text"}
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat("hello", "you")}) + "\nbroken\n")
        first = tmp_path / "a.jsonl"
        second = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat(text, text)} for text in TEXTS])
        options = {"format": "messages", "chat_template": "chatml", "workers": 1}
    given = {"events": Events(), "on_bad_row": "skip", **options}
    opened = opening._open_stored
    with monkeypatch.context() as patched:

        @contextmanager
        def breaking(source):
            with opened(source) as stream:
                yield Broken(stream, 1) if source.name == "b.jsonl" else stream

        patched.setattr(opening, "_open_stored", breaking)
        with pytest.raises(SourceError, match="Connection reset by peer"):
            tokenize([first, second], model, tmp_path / "out", **given)
    assert len((tmp_path / "out" / "shards.jsonl").read_text().splitlines()) > 1
    found = tokenize([first, second], model, tmp_path / "out", **given)
    assert found["skipped_rows"] == 1
    tokenize([first, second], model, tmp_path / "whole", **given)
    kept, whole = (
        DatasetManifest.model_validate_json((tmp_path / n / "manifest.json").read_text()) for n in ("out", "whole")
    )
    assert (kept.files, kept.left_out) == (whole.files, whole.left_out)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_full_disk_keeps_the_finished_shards(tmp_path, model, small_blocks, begun):
    path, out = rows(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(
            DiskSpaceError, match=r"free some space or choose another disk .* rows are tokenized and kept"
        ):
            tokenize([path], model, out, events=Events(), format="text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tokenize([path], model, out, events=Events(), format="text")
    assert begun[1][1] > 0
    tokenize([path], model, tmp_path / "whole", events=Events(), format="text")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_bad_row_late_costs_the_command_nothing_when_it_is_skipped(tmp_path, model, small_blocks, begun):
    first, second = rows(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}, {"text": 3}])
    given = ["--input", first, "--input", second, "--tokenizer", model, "--format", "text", "--out"]
    result = command(*given, tmp_path / "out")
    assert isinstance(result.exception, DatasetFormatError)
    told = "row 2: field 'text' is a number, not text (the first 2,000 rows are tokenized and kept"
    assert told in str(result.exception)
    assert not (tmp_path / "out").exists()
    assert command(*given, tmp_path / "out", "--on-bad-row", "skip").exit_code == 0
    assert begun[-1] == (0, 2000)
    assert command(*given, tmp_path / "whole", "--on-bad-row", "skip").exit_code == 0
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert DatasetManifest.read(tmp_path / "out").left_out.skipped_rows == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out", "whole"]


def test_what_was_left_with_rows_skipped_is_no_start_where_none_may_be(tmp_path, model, small_blocks, monkeypatch):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 3}])
    second, out = rows(tmp_path / "b.jsonl", ["y"]), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("megatron_ext.data.tokenization._manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize([first, second], model, out, events=Events(), format="text", on_bad_row="skip")
    with pytest.raises(DatasetFormatError, match=r"a\.jsonl, row 2: field 'text' is a number"):
        tokenize([first, second], model, out, events=Events(), format="text")
    assert not list(out.iterdir())


def test_an_error_before_the_first_shard_leaves_nothing(tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": 3}])
    result = command("--input", path, "--tokenizer", model, "--format", "text", "--out", tmp_path / "out")
    assert isinstance(result.exception, DatasetFormatError)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_stage_that_failed_goes_on_in_its_partial_folder(tmp_path, model, monkeypatch):
    from tasks.artifacts import IdxmapDataset
    from tasks.build import Build, Input
    from tasks.stage import Spec, produce
    from tasks.store import Store

    monkeypatch.setenv("MFLOW_ARTIFACTS", str(tmp_path / "store"))
    good = [{"messages": chat("question", f"answer {n}")} for n in range(30)]
    files = [write_jsonl(tmp_path / "a.jsonl", good), write_jsonl(tmp_path / "b.jsonl", [*good, {"messages": 3}])]
    inputs = {
        "files": Input("files", lambda: [str(path) for path in files], "data.files"),
        "tokenizer": Input("tokenizer", lambda: str(model), "model"),
    }

    class Watcher:
        def __init__(self):
            self.events = []

        def event(self, event):
            self.events.append(event)

        def log(self, lines):
            pass

    spec, watcher = Spec("tokenize-dataset", 1, IdxmapDataset), Watcher()
    options = {"chat_template": "chatml", "format": "messages"}
    build = Build(identity={}, inputs=inputs, job="tokenize", config=options)
    with pytest.raises(DatasetFormatError, match=r"b\.jsonl, row 31: .*the first 30 rows are tokenized and kept"):
        produce(spec, build, watcher)
    build = Build(identity={}, inputs=inputs, job="tokenize", config={**options, "on_bad_row": "skip"})
    watcher.events.clear()
    manifest, _ = produce(spec, build, watcher)
    assert next(event["done"] for event in watcher.events if event["event"] == "progress") == 30
    assert manifest.summary["documents"] == 60
    assert not (Path(Store.current().partial("dataset", manifest.fingerprint)) / "shards.jsonl").exists()


def test_what_was_left_of_a_url_whose_content_changed_is_no_start(tmp_path, model, monkeypatch):
    import fsspec

    memory, url = fsspec.filesystem("memory"), "memory://resuming/a.jsonl"
    later = write_jsonl(tmp_path / "b.jsonl", [{"text": 3}])
    try:
        memory.pipe("/resuming/a.jsonl", b'{"text": "old"}\n')
        with pytest.raises(DatasetFormatError, match="the first 1 rows are tokenized and kept"):
            tokenize([url, later], model, tmp_path / "out", events=Events(), format="text")
        memory.pipe("/resuming/a.jsonl", b'{"text": "new"}\n')
        tokenize([url, later], model, tmp_path / "out", events=Events(), format="text", on_bad_row="skip")
        tokenize([url, later], model, tmp_path / "whole", events=Events(), format="text", on_bad_row="skip")
        assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
        opened = opening._open_stored

        @contextmanager
        def changing(source):
            with opened(source) as stream:
                yield stream
            memory.pipe("/resuming/a.jsonl", b'{"text": "newer"}\n')

        monkeypatch.setattr(opening, "_open_stored", changing)
        with pytest.raises(SourceError, match="changed while it was read"):
            tokenize([url], model, tmp_path / "other", events=Events(), format="text")
        assert not list((tmp_path / "other").iterdir())
    finally:
        memory.rm("/resuming", recursive=True)
