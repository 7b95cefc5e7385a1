"""What an input of `data.files` means: files, globs, folders, weights, URLs; one that means nothing is named."""

import os

import pytest
from data_files import TEXTS, packed, texts_of, write_texts

from megatron_ext.data.sources import KINDS, Source, column_batches, expand, read_rows
from megatron_ext.errors import SourceError


def names(sources):
    return [source.name for source in sources]


def touch(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def test_inputs_keep_their_order_and_globs_and_folders_are_sorted(tmp_path):
    touch(tmp_path, "b/2.jsonl", "b/10.jsonl", "b/deep/1.txt.GZ", "a/z.csv", "a/y.parquet", "a/note.md")
    touch(tmp_path, "b/_SUCCESS.json", "b/.hidden/x.json", "b/dataset_info.json")
    found = expand([tmp_path / "b", str(tmp_path / "a" / "*.[cp]*")])
    assert names(found) == ["10.jsonl", "2.jsonl", "1.txt.GZ", "y.parquet", "z.csv"]
    assert [source.kind for source in found[2:]] == [".txt", ".parquet", ".csv"]
    assert found[2].compression == "gzip"
    assert found[3].input == str(tmp_path / "a" / "*.[cp]*")
    assert names(expand([str(tmp_path / "**" / "*.jsonl")])) == ["10.jsonl", "2.jsonl"]


def test_a_weight_stands_in_front(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl", "0.5:d.jsonl")
    found = expand([f"0.7:{tmp_path}/[ab].jsonl", f"3:{tmp_path / 'c.jsonl'}", Source(str(tmp_path / "0.5:d.jsonl"))])
    assert [(source.name, source.weight) for source in found] == [
        ("a.jsonl", 0.7), ("b.jsonl", 0.7), ("c.jsonl", 3.0), ("0.5:d.jsonl", None),
    ]  # fmt: skip
    with pytest.raises(SourceError, match="a weight is a number greater than 0"):
        expand([f"0:{tmp_path}/a.jsonl"])


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path):
    touch(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert names(expand([tmp_path / "a[1].jsonl"])) == ["a[1].jsonl"]


def test_inputs_that_mean_nothing_are_refused(tmp_path):
    touch(tmp_path, "a.jsonl", "empty/note.md")
    for given, problem in [
        ([], "no data files were given"),
        ([f"{tmp_path}/*.csv"], r"no file matches .*\*\.csv"),
        ([tmp_path / "empty"], "empty holds no data files"),
        ([tmp_path / "gone.jsonl"], r"gone\.jsonl does not exist"),
        ([tmp_path / "empty/note.md"], r"note\.md is of no supported kind; supported: \.json, \.jsonl, \.parquet"),
        ([tmp_path / "a.jsonl", f"{tmp_path}/*.jsonl"], r"a\.jsonl is named twice, by .*a\.jsonl and .*\*\.jsonl"),
    ]:
        with pytest.raises(SourceError, match=problem):
            expand(given)
    with pytest.raises(SourceError, match="is a folder"):
        list(read_rows(tmp_path))


# --- URLs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    import fsspec

    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_urls_globs_and_folders_of_a_remote_store_are_read(tmp_path, memory):
    for kind in KINDS:
        memory.pipe(f"/data/d{kind}", write_texts(tmp_path, f"d{kind}", TEXTS).read_bytes())
        memory.pipe(f"/data/more/d{kind}.gz", packed(tmp_path / f"d{kind}", ".gz").read_bytes())
    assert names(expand(["memory://data/*.csv"])) == ["d.csv"]
    found = expand(["2:memory://data"])
    assert len(found) == 2 * len(KINDS)
    assert {source.weight for source in found} == {2.0}
    for source in found:
        assert source.is_url
        assert source.size() > 0
        assert [row["text"] for _, row in read_rows(source)] == TEXTS
        assert [text for _, text in texts_of(column_batches(source, "text"))] == TEXTS


def test_remote_faults_are_named(memory, monkeypatch):
    memory.pipe("/data/note.md", b"x")
    for given, problem in [
        ("memory://data/gone.jsonl", r"data file memory://data/gone\.jsonl does not exist"),
        ("memory://data/*.jsonl", r"no file matches memory://data/\*\.jsonl"),
        ("memory://data", "memory://data holds no data files"),
        ("nosuch://data/x.jsonl", "nosuch://data/x.jsonl cannot be opened: Protocol not known: nosuch"),
        ("gs://bucket/x.jsonl", "gs://bucket/x.jsonl needs a package that is not installed: pip install gcsfs"),
    ]:
        with pytest.raises(SourceError, match=problem):
            expand([given])
    with pytest.raises(SourceError, match=r"memory://data/gone\.jsonl does not exist"):
        list(read_rows("memory://data/gone.jsonl"))


@pytest.fixture
def web(tmp_path):
    """A web server over a folder, on a port of its own."""
    import functools
    import http.server
    import threading

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_on_a_web_server_is_read_and_its_query_is_no_part_of_its_kind(tmp_path, web):
    write_texts(tmp_path, "d.jsonl", TEXTS)
    (source,) = expand([f"{web}/d.jsonl?download=true"])
    assert source.kind == ".jsonl"
    assert [row["text"] for _, row in read_rows(source)] == TEXTS
    with pytest.raises(SourceError, match=r"gone\.jsonl does not exist"):
        list(read_rows(f"{web}/gone.jsonl"))


def test_a_web_server_that_names_a_time_of_change_alone_is_enough(tmp_path, web):
    from megatron_ext.data.source_facts import remote_digest

    (source,) = expand([f"{web}/{write_texts(tmp_path, 'd.jsonl', TEXTS).name}"])
    before = remote_digest(source)
    assert remote_digest(source) == before
    os.utime(tmp_path / "d.jsonl", (1, 1))
    assert remote_digest(source) != before


def test_a_file_named_in_two_ways_is_named_twice(tmp_path):
    touch(tmp_path, "a/x.jsonl", "a/y.jsonl", "b/z.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a/x.jsonl")
    for twin in (f"{tmp_path}/b/../a/x.jsonl", tmp_path / "link.jsonl"):
        with pytest.raises(SourceError, match=r"(x|link)\.jsonl \(it is .*a/x\.jsonl, too\) is named twice"):
            expand([tmp_path / "a", twin])


def test_a_tokenized_dataset_in_a_folder_is_no_data(tmp_path):
    touch(tmp_path, "a.jsonl", "out/manifest.json", "out/tokens.bin", "out/tokenizer.json")
    touch(tmp_path, "half/shards.jsonl", "half/chosen_tokens.bin", "half2/manifest.json")
    assert names(expand([tmp_path])) == ["a.jsonl", "manifest.json"]
    with pytest.raises(SourceError, match="out holds no data files"):
        expand([tmp_path / "out"])


def test_what_can_be_read_once_alone_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for given in (tmp_path / "pipe.jsonl", "-", "/dev/null", f"2:{tmp_path}/pipe.jsonl"):
        with pytest.raises(SourceError, match=r"is no regular file, .* write it to a file first"):
            expand([given])
