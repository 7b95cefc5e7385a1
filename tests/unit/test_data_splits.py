"""Splits and blends: by content, by weight, and the same for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import splits
from megatron_ext.data.blends import sample_order, turns
from megatron_ext.data.idxmap import Idxmap, IdxmapWriter
from megatron_ext.errors import ConfigError


def documents(count: int, seed: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 60_000, draw.integers(1, 40)) for _ in range(count)]


def idxmap(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> Idxmap:
    with IdxmapWriter(prefix, dtype) as writer:
        writer.add(np.concatenate(documents), np.asarray([len(d) for d in documents]))
    return Idxmap(prefix)


def test_a_split_holds_out_about_the_fraction_and_is_the_same_for_ever(tmp_path: Path) -> None:
    held_out = splits.assign(idxmap(tmp_path / "a", documents(4000, 1)), 0.1, seed=5)
    assert 340 < held_out.sum() < 460
    assert np.flatnonzero(held_out)[:7].tolist() == [2, 11, 19, 32, 33, 38, 49]
    other = splits.assign(Idxmap(tmp_path / "a"), 0.1, seed=6)
    assert 0 < (held_out & other).sum() < 100


def test_adding_files_moves_no_document_between_the_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = documents(500, 1), documents(300, 2)
    before = splits.assign(idxmap(tmp_path / "a", old), 0.2, seed=1)
    monkeypatch.setattr(splits, "BLOCK", 100)
    after = splits.assign(idxmap(tmp_path / "b", [*new, *old], np.int32), 0.2, seed=1)
    assert after[300:].tolist() == before.tolist()


def test_a_larger_fraction_takes_more_and_gives_none_back(tmp_path: Path) -> None:
    data = idxmap(tmp_path / "a", documents(500, 3))
    few, more = splits.assign(data, 0.1, seed=1), splits.assign(data, 0.3, seed=1)
    assert (more | ~few).all()
    assert not splits.assign(data, 0, seed=1).any()
    assert splits.assign(data, 1, seed=1).all()


def test_equal_documents_lie_on_one_side(tmp_path: Path) -> None:
    held_out = splits.assign(idxmap(tmp_path / "a", documents(200, 4) * 3), 0.5, seed=1).reshape(3, 200)
    assert (held_out == held_out[0]).all()
    assert 0 < held_out[0].sum() < 200


@pytest.mark.parametrize("weights", [[1], [1, 1], [0.7, 0.2, 0.1], [1, 1e-4], [3, 5, 7, 11, 13]])
def test_each_share_is_met_to_within_one_sample_at_every_moment(weights: list[float]) -> None:
    which, number = turns(weights, 0, 3000)
    share = np.asarray(weights) / sum(weights)
    counts = np.stack([np.cumsum(which == place) for place in range(len(weights))], axis=1)
    assert np.abs(counts - np.arange(1, 3001)[:, None] * share).max() <= 1
    for place in range(len(weights)):
        assert number[which == place].tolist() == list(range((which == place).sum()))


def test_any_stretch_of_a_blend_is_known_without_what_came_before() -> None:
    sizes, weights = [7, 40, 3], [0.2, 0.7, 0.1]
    whole = sample_order(sizes, weights, 500, seed=3)
    for start, n in ((0, 1), (1, 3), (123, 77), (499, 1)):
        part = sample_order(sizes, weights, n, seed=3, start=start)
        for one, all_of_it in zip(part, whole, strict=True):
            assert one.tolist() == all_of_it[start : start + n].tolist()
    assert sample_order(sizes, weights, 500, seed=4)[1].tolist() != whole[1].tolist()


def test_an_exhausted_data_set_starts_again_in_another_order() -> None:
    which, samples = sample_order([5, 100], [0.5, 0.5], 40, seed=0)
    small = samples[which == 0].reshape(4, 5)
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in small.tolist())
    assert len({tuple(one) for one in small.tolist()}) > 1
    assert len(set(samples[which == 1].tolist())) == 20


@pytest.mark.parametrize(
    ("sizes", "weights"), [([3, 3], [1, 0]), ([3, 3], [1, float("nan")]), ([3, 0], [1, 1]), ([], [])]
)
def test_weights_and_sizes_that_make_no_blend_are_refused(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ConfigError):
        sample_order(sizes, weights, 10, seed=0)
