"""The store: artifacts appear whole, are checked when used, are built once, and survive kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.errors import ConfigError, DiskSpaceError, SourceError
from megatron_ext.folders import digest_file
from tasks.digests import SMALL, Checksum, SourceDigests, checksum, same_content
from tasks.launch.base import last_lines
from tasks.store import MANIFEST, Link, Manifest, Store

KNOWN = {"stage": "a-stage", "version": 1, "kind": "things", "identity": {"stage": "a-stage"}, "seconds": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, name: str = "f1", text: str = "hello", links: dict[str, Link] | None = None) -> Manifest:
    with store.locked("things", name):
        partial = store.open_partial("things", name)
        (partial / "sub").mkdir(exist_ok=True)
        (partial / "sub" / "file.txt").write_text(text)
        return store.publish(partial, links or {}, fingerprint=name, **KNOWN)


def test_an_artifact_is_found_by_its_fingerprint_and_in_its_store_only(store: Store, tmp_path: Path) -> None:
    assert store.look_up("things", "f1") is None
    make(store)
    assert store.look_up("things", "f1").files["sub/file.txt"].size == 5
    assert Store(tmp_path / "elsewhere").look_up("things", "f1") is None
    assert not store.partial("things", "f1").exists()


def _delete(file: Path) -> None:
    file.unlink()


def _truncate(file: Path) -> None:
    file.write_text("hell")


def _corrupt(file: Path) -> None:
    file.write_text("hellO")


def _lose_the_manifest(file: Path) -> None:
    (file.parent.parent / MANIFEST).unlink()


def _halve_the_manifest(file: Path) -> None:
    manifest = file.parent.parent / MANIFEST
    manifest.write_text(manifest.read_text()[:100])


@pytest.mark.parametrize("damage", [_delete, _truncate, _corrupt, _lose_the_manifest, _halve_the_manifest])
def test_damage_is_noticed_set_aside_and_mended(store: Store, damage) -> None:
    make(store)
    damage(store.folder("things", "f1") / "sub" / "file.txt")
    assert store.look_up("things", "f1") is None
    make(store)
    assert store.look_up("things", "f1") is not None
    assert len(list((store.root / "things").glob(".damaged-f1-*"))) == 1


def test_a_large_file_is_sampled_and_verified_fully(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(SMALL + 1000)
    recorded = checksum(path)
    assert recorded.sampled is not None
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"x")
    assert not same_content(path, recorded)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\0")
        file.seek(SMALL // 2 + (64 << 10))
        file.write(b"x")
    between_the_samples = same_content(path, recorded)
    assert between_the_samples
    assert not same_content(path, recorded, full=True)


def test_a_small_file_is_compared_whole(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(b"abc")
    assert checksum(path).sampled is None
    assert not same_content(path, Checksum(size=3, digest="0" * 32))


def test_a_source_that_changed_or_vanished_unmakes_the_artifact_that_links_to_it(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("one")
    stat = source.stat()
    place = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    with store.locked("things", "f2"):
        partial = store.open_partial("things", "f2")
        (partial / "link").symlink_to(source)
        store.publish(partial, {"link": Link(target=str(source), digest="d", **place)}, fingerprint="f2", **KNOWN)
    assert store.look_up("things", "f2") is not None
    os.utime(source, ns=(1, 1))
    assert store.look_up("things", "f2") is None
    source.unlink()
    assert "is gone" in store.faults(store.manifest("things", "f2"))[0]


BUILDER = """
import sys, time
from pathlib import Path
from tasks.store import Store
store, mark = Store(Path(sys.argv[1])), Path(sys.argv[2])
with store.locked("things", "f1"):
    if store.look_up("things", "f1"):
        print("found")
    else:
        partial = store.open_partial("things", "f1")
        (partial / "file").write_text("x")
        mark.write_text("in the partial folder")
        time.sleep(float(sys.argv[3]))
        store.publish(partial, {}, stage="s", version=1, kind="things", fingerprint="f1", identity={}, seconds=0.0)
        print("built")
"""


def _builder(store: Store, mark: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILDER, str(store.root), str(mark), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_at_once_build_once(store: Store, tmp_path: Path) -> None:
    builders = [_builder(store, tmp_path / f"mark{i}", 0.5) for i in range(3)]
    said = sorted(builder.communicate(timeout=60)[0].strip() for builder in builders)
    assert said == ["built", "found", "found"]


def test_a_killed_builder_leaves_nothing_half_and_frees_the_lock(store: Store, tmp_path: Path) -> None:
    builder = _builder(store, tmp_path / "mark", 60)
    _wait_for(tmp_path / "mark")
    assert store.look_up("things", "f1") is None
    assert store.leftovers() == []  # somebody builds it
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert store.look_up("things", "f1") is None
    assert store.leftovers() == [store.partial("things", "f1")]
    make(store)
    assert store.look_up("things", "f1") is not None


def test_the_lock_stays_with_a_child_that_still_writes(store: Store) -> None:
    with store.locked("things", "f1") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))

    class StillHeldError(Exception):
        pass

    def give_up() -> None:
        raise StillHeldError

    with pytest.raises(StillHeldError), store.locked("things", "f1", give_up):
        pass
    child.communicate(b"\n", timeout=30)
    with store.locked("things", "f1", give_up):
        pass


def test_artifacts_are_listed_found_by_prefix_and_removed(store: Store) -> None:
    make(store, "aa11")
    make(store, "aa22")
    assert [m.fingerprint for m in store.artifacts()] == ["aa11", "aa22"]
    assert store.find("things/aa2").fingerprint == "aa22"
    with pytest.raises(SourceError, match="not unique"):
        store.find("aa")
    with pytest.raises(SourceError, match="names no artifact"):
        store.find("bb")
    store.remove(store.find("aa1"))
    assert [m.fingerprint for m in store.artifacts()] == ["aa22"]


def test_digests_of_sources_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch) -> None:
    source = tmp_path / "source"
    source.write_text("one")
    first = SourceDigests(tmp_path / "store").digest(source)
    reads: list[Path] = []
    monkeypatch.setattr("tasks.digests.digest_file", lambda path: reads.append(path) or "digest of the new content")
    assert SourceDigests(tmp_path / "store").digest(source) == first
    assert reads == []
    os.utime(source, ns=(1, 1))
    assert SourceDigests(tmp_path / "store").digest(source) == "digest of the new content"
    assert reads == [source]


def test_an_error_about_a_link_names_the_users_own_file(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "mine.jsonl"
    source.write_text("{}")
    link = store.root / "sources" / "f" / "data" / "0" / "mine.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to(source)
    assert store.with_origins(f"{link}: row 1 is empty; see {link}, please") == (
        f"{source}: row 1 is empty; see {source}, please"
    )
    assert store.with_origins(f"{store.root}/x is not a link") == f"{store.root}/x is not a link"


def test_pruning_waits_for_no_one_and_deletes_nothing_that_is_being_built(store: Store, tmp_path: Path) -> None:
    make(store)
    (store.folder("things", "f1") / "sub" / "file.txt").write_text("hellO")
    builder = _builder(store, tmp_path / "mark", 60)
    _wait_for(tmp_path / "mark")
    aside = next(store.root.glob("things/.damaged-f1-*"))
    assert not store.discard(store.partial("things", "f1"))  # listed as a leftover before the builder came
    assert not store.discard(aside)
    assert store.partial("things", "f1").is_dir()
    builder.kill()
    builder.wait()
    assert set(store.leftovers()) == {store.partial("things", "f1"), aside}
    assert all(store.discard(path) for path in store.leftovers())
    assert store.leftovers() == []


def test_an_artifact_that_a_running_job_reads_is_not_removed(store: Store) -> None:
    manifest = make(store)
    work = store.work("others", "g1")
    work.mkdir(parents=True)
    (work / "job.json").write_text(json.dumps({"inputs": {"model": str(store.folder("things", "f1"))}}))
    with store.locked("others", "g1"), pytest.raises(SourceError, match="in use by others-g1"):
        store.remove(manifest)
    store.remove(manifest)
    assert store.artifacts() == []


def test_a_full_or_forbidden_disk_is_an_error_with_a_remedy(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="free some space"), store.writing():
        Path("/dev/full").write_text("x")
    (tmp_path / "file").write_text("")
    nowhere = Store(tmp_path / "file")
    with pytest.raises(ConfigError, match="MFLOW_ARTIFACTS"), nowhere.writing(), nowhere.locked("things", "f1"):
        pass
    with pytest.raises(NotADirectoryError), store.writing():
        (tmp_path / "file" / "of_the_user").read_text()


def test_a_source_can_be_read_where_nothing_can_be_remembered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    assert SourceDigests(tmp_path / "file").digest(tmp_path / "file") == digest_file(tmp_path / "file")


def test_a_source_that_changes_while_it_is_read_is_noticed(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("one")
    stat = source.stat()
    link = Link(target=str(source), digest="d", size=3, mtime_ns=stat.st_mtime_ns, inode=stat.st_ino)
    with store.locked("things", "f2"):
        partial = store.open_partial("things", "f2")
        (partial / "data").mkdir()
        (partial / "data" / "x").symlink_to(source)
        store.publish(partial, {"data/x": link}, fingerprint="f2", **KNOWN)
    assert store.link_faults("things", "f2", "data") == []
    source.write_text("two!")
    assert store.link_faults("things", "f2", "data") == [f"{source} has changed"]
    assert store.link_faults("things", "f2", "model") == []


def test_the_last_lines_are_those_of_this_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("fault of the first attempt\n")
    first = log.stat().st_size
    assert last_lines(log, first) == "(it wrote nothing)"
    log.write_text(log.read_text() + "a\nb\n")
    assert last_lines(log, first) == "a\nb"
