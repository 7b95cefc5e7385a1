"""Windows of text and blends, beside megatron-core's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_ext.data.blends import turns
from megatron_ext.data.datasets import open_dataset
from megatron_ext.data.idxmap import IdxmapWriter
from megatron_ext.data.samples import Samples
from megatron_ext.data.selection import Choice, select


def test_windows_of_text_are_the_samples_of_megatron_core(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, unique_identifiers = 500, 0, {}

    draw = np.random.default_rng(1)
    lengths = draw.integers(2, 40, 120)
    prefix = tmp_path / "corpus_text_document"
    with IdxmapWriter(prefix, np.uint16) as writer:
        writer.add(draw.integers(0, 500, lengths.sum()), lengths)

    theirs = GPTDataset(
        IndexedDataset(str(prefix)), str(prefix), np.arange(120, dtype=np.int32), None, Split.train,
        GPTDatasetConfig(
            random_seed=11, sequence_length=64, tokenizer=Tokenizer(), reset_position_ids=False, split="1,0,0",
            reset_attention_mask=False, eod_mask_loss=False, path_to_cache=str(tmp_path / "megatron"),
        ),
    )  # fmt: skip
    data = open_dataset(prefix)
    found = select(data, Choice(seq_length=64, seed=11))
    samples = Samples(data, found.stream)
    assert len(found.documents) == len(theirs)
    for number in range(len(theirs)):
        window = samples.read(int(theirs.shuffle_index[number]), 65)
        assert torch.equal(theirs[number]["tokens"], torch.from_numpy(window.tokens[:-1].astype(np.int64)))
        assert torch.equal(theirs[number]["labels"], torch.from_numpy(window.tokens[1:].astype(np.int64)))
        assert window.trained.all()


def test_it_follows_the_weights_as_closely_as_megatron_core() -> None:
    from megatron.core.datasets import helpers

    weights = np.asarray([0.5, 0.3, 0.15, 0.05])
    theirs, within = np.zeros(2000, dtype=np.int16), np.zeros(2000, dtype=np.int64)
    helpers.build_blending_indices(theirs, within, weights.tolist(), 4, 2000, False)
    ours, _ = turns(weights.tolist(), 0, 2000)

    def worst(which: np.ndarray) -> float:
        counts = np.stack([np.cumsum(which == place) for place in range(4)], axis=1)
        return float(np.abs(counts - np.arange(1, 2001)[:, None] * weights).max())

    assert worst(ours) <= worst(theirs)
    assert np.bincount(ours).tolist() == np.bincount(theirs).tolist()
