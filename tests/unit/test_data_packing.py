"""Packing: every document once, no bin too full, nearly no room lost, the same for the same seed."""

import time

import numpy as np
import pytest

from megatron_ext.config import TrainConfig
from megatron_ext.data.packing import pack, separate


def lengths_like_chat(count: int, seq_length: int) -> np.ndarray:
    return np.clip(np.random.default_rng(3).lognormal(5.3, 0.8, count).astype(np.int64), 1, seq_length)


@pytest.mark.parametrize("seq_length", [7, 64, 4096])
def test_every_document_is_in_exactly_one_bin_and_no_bin_overflows(seq_length):
    lengths = lengths_like_chat(5000, seq_length)
    packing = pack(lengths, seq_length, seed=5)
    assert sorted(packing.documents.tolist()) == list(range(5000))
    assert max(lengths[packing[b]].sum() for b in range(len(packing))) <= seq_length
    assert sum(len(packing[b]) for b in range(len(packing))) == 5000
    assert min(len(packing[b]) for b in range(len(packing))) >= 1


def one_by_one(lengths, seq_length):
    """Best-fit decreasing, written down plainly: multiset of what is left in the bins."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= length]
        best = min(fitting) if fitting else seq_length
        if fitting:
            rooms.remove(best)
        rooms.append(best - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    seq_length = int(rng.integers(5, 60))
    lengths = rng.integers(1, seq_length + 1, rng.integers(1, 200))
    packing = pack(lengths, seq_length, seed=0)
    rooms = [seq_length - int(lengths[packing[b]].sum()) for b in range(len(packing))]
    assert sorted(rooms) == one_by_one(lengths.tolist(), seq_length)


ALIGNMENT = TrainConfig.model_fields["pack_alignment"].default


@pytest.mark.parametrize(("alignment", "useful"), [(ALIGNMENT, 0.96), (1, 0.999)])
def test_a_million_documents_pack_almost_without_loss_in_seconds(alignment, useful):
    lengths = lengths_like_chat(1_000_000, 4096)
    start = time.process_time()
    packing = pack(lengths, 4096, 1, alignment)
    assert time.process_time() - start < 5
    assert packing.fill > 0.99
    assert useful < packing.useful <= packing.fill
    assert packing.tokens == lengths.sum()


def test_order_is_a_pure_function_of_the_seed():
    lengths = lengths_like_chat(3000, 512)
    first, again, other = (pack(lengths, 512, seed=s) for s in (1, 1, 2))
    assert first.documents.tobytes() == again.documents.tobytes()
    assert first.bounds.tobytes() == again.bounds.tobytes()
    assert first.documents.tobytes() != other.documents.tobytes()


def test_order_stays_the_same_over_releases():
    packing = pack(np.array([5, 3, 2, 7, 1, 4, 6, 2]), 8, seed=0)
    assert [packing[b].tolist() for b in range(len(packing))] == [[0, 1], [3, 4], [7, 5], [6, 2]]


def test_bins_do_not_come_sorted_by_length():
    lengths = lengths_like_chat(3000, 512)
    packing = pack(lengths, 512, seed=1)
    longest = np.array([lengths[packing[b]].max() for b in range(len(packing))])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.1


def test_separate_keeps_documents_apart():
    packing = separate(np.array([3, 1, 2]), 4, seed=0)
    assert sorted(len(packing[b]) for b in range(3)) == [1, 1, 1]
    assert sorted(packing.documents.tolist()) == [0, 1, 2]
    assert packing.fill == 6 / 12


@pytest.mark.parametrize("lengths", [[5, 9], [0, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="truncate or drop"):
        pack(np.array(lengths), 8, seed=0)


def test_nothing_packs_into_nothing():
    assert len(pack(np.array([], dtype=np.int64), 8, seed=0)) == 0
