"""--out: published whole or not at all."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from megatron_ext.errors import DiskSpaceError, OutputExistsError, SourceError
from megatron_ext.folders import digest_file, folder_lock, full_disk_named, published, require_space


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_out_appears_with_everything_in_it(tmp_path):
    with published(tmp_path / "out", marker="convert") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path / "out") == {"a": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_faulty_input_leaves_nothing(tmp_path):
    with pytest.raises(SourceError), published(tmp_path / "out", marker="convert") as partial:
        (partial / "a").write_text("1")
        raise SourceError("no such file")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_keeps_the_partial_for_the_next_attempt(tmp_path):
    with pytest.raises(ZeroDivisionError), published(tmp_path / "out", marker="convert") as partial:
        (partial / "a").write_text("1")
        raise ZeroDivisionError
    with published(tmp_path / "out", marker="convert") as partial:
        assert contents(partial) == {"a": "1"}


def test_a_filled_out_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputExistsError, match="--overwrite"), published(tmp_path / "out", marker="convert"):
        pass
    assert contents(tmp_path / "out") == {"mine": "precious"}


def test_overwrite_replaces_only_when_the_new_one_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(SourceError), published(tmp_path / "out", overwrite=True, marker="convert"):
        raise SourceError("bad")
    assert contents(tmp_path / "out") == {"old": "1"}
    with published(tmp_path / "out", overwrite=True, marker="convert") as partial:
        (partial / "new").write_text("2")
    assert contents(tmp_path / "out") == {"new": "2"}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_overwrite_killed_between_its_steps_loses_nothing_and_leaves_nothing(step, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    calls = [Path.rename, Path.rename, shutil.rmtree]

    def killed(*arguments, **options):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(arguments)
        return calls[len(done) - 1](*arguments, **options)

    done: list = []
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt), published(out, overwrite=True, marker="convert") as partial:
            (partial / "new").write_text("2")
    with pytest.raises(OutputExistsError, match="--overwrite"), published(out, marker="export"):
        pass
    assert contents(out) == ({"new": "2"} if step == 2 else {"old": "1"})
    with published(out, overwrite=True, marker="convert") as partial:
        (partial / "new").write_text("3")
    assert contents(out) == {"new": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_that_is_overwritten_leaves_what_it_points_to(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "mine").write_text("1")
    (tmp_path / "out").symlink_to(tmp_path / "place")
    with published(tmp_path / "out", overwrite=True, marker="convert") as partial:
        (partial / "new").write_text("2")
    assert contents(tmp_path / "out") == {"new": "2"}
    assert contents(tmp_path / "place") == {"mine": "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "place"]


def test_two_commands_on_one_out_exclude_each_other(tmp_path, capsys):
    started, refused = threading.Event(), []

    def second():
        started.set()
        try:
            with published(tmp_path / "out", marker="convert"):
                pass
        except OutputExistsError as error:
            refused.append(error)

    with published(tmp_path / "out", marker="convert") as partial:
        thread = threading.Thread(target=second)
        thread.start()
        started.wait()
        (partial / "a").write_text("first")
        while "waiting" not in (told := capsys.readouterr().err):
            assert thread.is_alive()
    thread.join()
    assert told == f"waiting for process {os.getpid()}, which writes {tmp_path / 'out'}\n"
    assert len(refused) == 1
    assert contents(tmp_path / "out") == {"a": "first"}


def test_lock_is_taken_anew_when_its_file_was_removed(tmp_path):
    with folder_lock(tmp_path / "lock"):
        (tmp_path / "lock").unlink()
        with folder_lock(tmp_path / "lock"):
            assert (tmp_path / "lock").exists()


def test_too_little_space_is_refused_with_figures(tmp_path):
    with pytest.raises(DiskSpaceError, match=r"the checkpoint needs 1000000000\.00 GB"):
        require_space(tmp_path / "not" / "there", 10**18, "the checkpoint")


def test_digest_tells_files_of_the_same_size_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b").write_bytes(b"x" * 999 + b"y")
    assert digest_file(tmp_path / "a") != digest_file(tmp_path / "b")


def test_overwriting_what_the_command_reads_is_refused(tmp_path):
    (tmp_path / "model" / "more").mkdir(parents=True)
    for read in (tmp_path / "model", tmp_path / "model" / "more"):
        again = published(tmp_path / "model", overwrite=True, marker="export", inputs=[read])
        with pytest.raises(OutputExistsError, match="would be lost"), again:
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_refused():
    nowhere = published(Path("/proc/nowhere"), marker="convert")
    with pytest.raises(OutputExistsError, match="cannot write --out /proc/nowhere"), nowhere:
        pass


def test_a_disk_that_fills_up_is_named_also_where_torch_hides_it(tmp_path):
    with pytest.raises(DiskSpaceError, match="No space left on device; free some space"), full_disk_named(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")
    with pytest.raises(RuntimeError, match="another"), full_disk_named(tmp_path):
        raise RuntimeError("another")
    with pytest.raises(IsADirectoryError), full_disk_named(tmp_path):
        tmp_path.read_text()
