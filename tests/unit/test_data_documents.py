"""Marks put on encoded documents, never twice; pieces; and options that some kinds of data cannot follow."""

from itertools import chain

import numpy as np
import pytest
from chat_data import chat, write_chat_tokenizer
from tiny import write_jsonl

from megatron_ext.data.documents import Batch, Finish
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.tokenization import tokenize
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.events import Events

EOD = 9


def batch(*documents, masks=None):
    return Batch(
        np.array([*chain.from_iterable(documents)], dtype=np.int32),
        None if masks is None else np.array([*chain.from_iterable(masks)], dtype=np.uint8),
        np.array([len(d) for d in documents], dtype=np.int64),
    )


def documents_of(side):
    return [side.ids[a : a + n].tolist() for a, n in zip(side.starts.tolist(), side.lengths.tolist(), strict=True)]


class Heard(Events):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"), eos_token="<|im_end|>")


def test_an_end_mark_that_an_answer_ends_with_is_not_put_on_again():
    side = batch(*([1, EOD, 5], [1, 2, 5], [1, EOD, 5], [1, EOD]), masks=[[1, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1]])
    (marked,), _ = Finish(eod=EOD).apply([side], text=False)
    assert documents_of(marked) == [[1, EOD, 5], [1, 2, 5, EOD], [1, EOD, 5, EOD], [1, EOD]]
    whole = batch(*([1, EOD, 5], [1, EOD, 5], [EOD, 5, 6], [5]), masks=[[1, 1, 1], [1, 0, 1], [1, 1, 1], [1]])
    (marked,), _ = Finish(eod=EOD).apply([whole], text=False)
    assert documents_of(marked) == [[1, EOD, 5], [1, EOD, 5, EOD], [EOD, 5, 6, EOD], [5, EOD]]
    (text,), _ = Finish(eod=EOD).apply([batch([1, EOD, 5])], text=True)
    assert documents_of(text) == [[1, EOD, 5, EOD]]


@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_chatml_with_its_own_marker_as_eos_token_ends_once(tmp_path, model, train_on_prompt):
    path, out = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "a")}]), tmp_path / "out"
    out.mkdir()
    options = {"append_eod": True, "chat_template": "chatml", "train_on_prompt": train_on_prompt}
    tokenize([path], model, out, events=Events(), **options)
    said = load_tokenizer(model).decode(Idxmap(out / "tokens")[0].tolist(), skip_special_tokens=False)
    assert said.endswith("assistant\na<|im_end|>\n")


@pytest.mark.parametrize(("length", "pieces"), [(8, [4, 3, 2]), (7, [4, 4]), (9, [4, 4, 2]), (4, [3, 2]), (3, [4])])
def test_no_piece_is_an_end_mark_alone(length, pieces):
    both = batch([1] * length, [2] * length)
    (cut,), counts = Finish(eod=EOD, max_length=4, overlong="split").apply([both], text=True)
    assert cut.lengths.tolist() == pieces * 2
    assert counts.split == (2 if len(pieces) > 1 else 0)
    assert [*chain.from_iterable(documents_of(cut))] == [1] * length + [EOD] + [2] * length + [EOD]


@pytest.mark.parametrize("option", ["last_turn_only", "train_on_prompt"])
@pytest.mark.parametrize(
    ("row", "kind"), [({"text": "abc"}, "text"), ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference")]
)
def test_an_option_that_the_data_cannot_follow_is_refused_by_name(row, kind, option, tmp_path, model):
    path, out = write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path / "out"
    out.mkdir()
    with pytest.raises(ConfigError, match=f"{option} is for conversations, but this is {kind} data"):
        tokenize([path], model, out, events=Events(), chat_template="chatml", **{option: True})


def test_a_chat_template_for_text_is_noted(tmp_path, model):
    path, out, heard = write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), tmp_path / "out", Heard()
    out.mkdir()
    tokenize([path], model, out, events=heard, chat_template="chatml")
    assert any("'chatml' is not used in tokenizing" in note for note in heard.notes)
