"""What of the data is not, or not whole, in a dataset: counted, kept in the manifest, and told to a person."""

import json

import numpy as np
import pytest
from chat_data import chat, write_chat_tokenizer
from tiny import write_jsonl
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.data.documents import Batch, Finish
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.inspection import inspect_dataset
from megatron_ext.data.inspection_views import facts
from megatron_ext.data.manifest import DatasetManifest
from megatron_ext.data.tokenization import tokenize
from megatron_ext.errors import DatasetFormatError
from megatron_ext.events import Events, Follower

LONG = "capital " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("model"))


def written(rows, model, folder, **options):
    """The manifest, and the notes that were sent."""
    path = write_jsonl(folder / "a.jsonl", rows)
    events = folder / "events.jsonl"
    tokenize([path], model, folder / "out", events=Events(events), **({"chat_template": "chatml"} | options))
    notes = [event["text"] for event in Follower(events).new() if event["event"] == "note"]
    return DatasetManifest.read(folder / "out"), notes


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": p, "completion": c} for p, c in ((LONG, "Paris"), ("q", "Paris"), ("q", LONG))],
        [{"messages": chat(*texts)} for texts in ((LONG, "Paris"), ("q", "Paris"), ("q", LONG))],
        [
            {"prompt": LONG, "chosen": "Paris", "rejected": "France"},
            {"prompt": "q", "chosen": "Paris", "rejected": "France"},
            {"prompt": "q", "chosen": "Paris", "rejected": LONG},
        ],
    ],
    ids=["prompt_completion", "messages", "preference"],
)  # fmt: skip
def test_a_document_whose_answer_was_cut_off_entirely_is_left_out_and_told(rows, tmp_path, model):
    manifest, notes = written(rows, model, tmp_path, max_length=50)
    assert (manifest.documents, manifest.untrained_documents) == (2, 0)
    out = manifest.left_out
    assert (out.answers_cut_off, out.truncated, out.dropped) == (1, 1, 0)
    for prefix in [name for name in manifest.prefixes if name.endswith("loss_mask")]:
        masks = Idxmap(tmp_path / "out" / prefix)
        assert all(masks[n].any() for n in range(len(masks)))
    assert "1 document was dropped, because max_length 50 left nothing of the answer" in notes
    assert f"1 document was cut to max_length 50, {out.truncated_tokens:,} tokens lost" in notes
    assert manifest.files[0].rows == 3


def test_nothing_but_cut_off_answers_is_an_error_that_says_so(tmp_path, model):
    rows = [{"messages": chat(LONG, "Paris")}]
    with pytest.raises(DatasetFormatError, match=r"of 1 rows: .* 1 whose answer was beyond max_length 50"):
        written(rows, model, tmp_path, max_length=50)


def side(*masks):
    return Batch(
        np.arange(sum(map(len, masks)), dtype=np.int32),
        np.array([bit for mask in masks for bit in mask], dtype=np.uint8),
        np.array([len(mask) for mask in masks], dtype=np.int64),
    )


def test_a_pair_goes_when_either_side_loses_its_answer_and_what_never_had_one_stays():
    untrained, early, late, short = [0] * 9, [0, 1, *[0] * 7], [0] * 8 + [1], [0, 1]
    chosen, rejected = side(untrained, early, late, early, short), side(short, early, early, late, short)
    (kept, _), cuts = Finish(max_length=4).apply([chosen, rejected], text=False)
    assert (cuts.answers_cut_off, cuts.truncated) == (2, 2)
    assert [part.tolist() for part in np.split(kept.mask, kept.starts[1:])] == [[0] * 4, [0, 1, 0, 0], [0, 1]]
    assert kept.ids.tolist() == [0, 1, 2, 3, 9, 10, 11, 12, 36, 37]
    with_bos, cuts = Finish(bos=99, max_length=2).apply([side(short)], text=False)
    assert (len(with_bos[0].lengths), cuts.answers_cut_off) == (0, 1)


ROWS = [{"messages": "x"}, *[{"messages": chat("q", text)} for text in ("Paris", LONG, "a")]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--overlong", "drop"], ["1 document was longer than max_length 50 and dropped"]),
        (["--overlong", "truncate"], ["1 document was cut to max_length 50, ", " tokens lost"]),
    ],
)
def test_the_command_tells_on_stderr_what_it_left_out_and_stdout_stays_one_object(options, said, tmp_path, model):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    arguments = ["tokenize", "--input", path, "--tokenizer", model, "--out", tmp_path / "out", "--format", "messages"]
    arguments += ["--chat-template", "chatml", "--on-bad-row", "skip", "--max-length", 50, "--json", *options]
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["skipped_rows"] == 1
    told = f"1 row was skipped, for not fitting; {path}, row 1: field 'messages' is text, not a list"
    for sentence in [told, *said]:
        assert sentence in result.stderr
        assert sentence in "\n".join(facts(inspect_dataset(tmp_path / "out", 0)))


def test_split_and_empty_text_is_told(tmp_path, model):
    rows = [{"text": text} for text in ("", "", LONG, "Paris")]
    _, notes = written(rows, model, tmp_path, max_length=20, overlong="split", chat_template=None)
    assert "2 rows were empty" in notes
    assert "1 document was cut into several of at most max_length 20" in notes


def test_a_dataset_that_holds_all_of_its_data_has_nothing_to_tell(tmp_path, model):
    manifest, notes = written(ROWS[1:], model, tmp_path)
    assert manifest.losses() == []
    assert not [note for note in notes if " was " in note or " were " in note]
