"""Tokenizers: a bare sentencepiece model gives transformers' ids, the slow one those of the Python tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_data import write_chat_tokenizer
from sentencepiece_data import TEXT, write_sentencepiece

from megatron_ext.data.chat_templates import find_template, special_tokens
from megatron_ext.data.definition import Definition
from megatron_ext.data.encoding import encode, to_arrays
from megatron_ext.data.idxmap import Idxmap
from megatron_ext.data.rendering import ChatTemplate, Rendered
from megatron_ext.data.tokenizers import (
    load_tokenizer,
    read_vocabulary,
    require_sentencepiece,
    require_vocabulary,
    tokenizer_file,
)
from megatron_ext.errors import SourceError, VocabularyError
from megatron_ext.events import Events

STRINGS = [
    *TEXT[:4],
    "",
    " ",
    " a blank first",
    "line\nbreak\n\n",
    "日本語 🎉 wörld e\u0301",
    "<s>[INST] hi [/INST] hello</s><s>again</s> >= x",
    "a</s>b</s>= c",
    "▁ is a blank, too",
    "x" * 300,
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False}])
def test_a_bare_sentencepiece_model_gives_the_ids_of_transformers(tmp_path: Path, config: dict) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = write_sentencepiece(tmp_path / "hf", **config)
    reference = (AutoTokenizer if config else LlamaTokenizer).from_pretrained(folder)
    assert ids(load_tokenizer(folder), STRINGS) == reference(STRINGS, add_special_tokens=False).input_ids


def test_it_is_converted_once_and_then_without_transformers(tmp_path: Path, cache: Path) -> None:
    folder = write_sentencepiece(tmp_path / "hf", legacy=False)
    made = tokenizer_file(folder)
    assert made.is_relative_to(cache)
    script = (
        "import sys; from pathlib import Path; from megatron_ext.data.tokenizers import load_tokenizer;"
        "print(load_tokenizer(Path(sys.argv[1])).encode('Paris is large', add_special_tokens=False).ids);"
        "assert not {'transformers', 'torch', 'sentencepiece'} & set(sys.modules)"
    )
    moved = folder.rename(tmp_path / "moved")
    said = subprocess.run(
        [sys.executable, "-c", script, str(moved)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == str(ids(load_tokenizer(moved), ["Paris is large"])[0])
    assert tokenizer_file(moved) == made

    (moved / "tokenizer_config.json").unlink()
    assert tokenizer_file(moved) != made


def test_a_folder_with_tokenizer_json_is_taken_as_it_is(tmp_path: Path, cache: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "hf")
    write_sentencepiece(folder)
    assert tokenizer_file(folder) == folder / "tokenizer.json"
    assert not cache.exists()


def test_the_slow_tokenizer_gives_the_ids_of_the_python_tokenizer(tmp_path: Path) -> None:
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    folder = write_sentencepiece(tmp_path / "hf", legacy=True, pad_token="<pad>")
    reference = SentencePieceBackend.from_pretrained(folder)
    slow = load_tokenizer(folder, slow=True)
    assert ids(slow, STRINGS) == [reference(text, add_special_tokens=False).input_ids for text in STRINGS]
    assert slow.get_vocab() == reference.get_vocab()
    assert slow.token_to_id("<pad>") == 340
    assert ids(slow, [" a  b"]) != ids(load_tokenizer(folder), [" a  b"])


@pytest.mark.parametrize("config", [{}, {"add_prefix_space": False}])
def test_a_slow_tokenizer_that_is_not_legacy_agrees_with_the_fast_one_but_for_blanks_at_the_start(
    tmp_path: Path, config: dict
) -> None:
    folder = write_sentencepiece(tmp_path / "hf", legacy=False, **config)
    texts = [text for text in STRINGS if not text.startswith((" ", "▁"))]
    assert ids(load_tokenizer(folder, slow=True), texts) == ids(load_tokenizer(folder), texts)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_slow_token_knows_its_characters(tmp_path: Path, legacy: bool) -> None:
    slow = load_tokenizer(write_sentencepiece(tmp_path / "hf", legacy=legacy), slow=True)
    text = "<s>What is 日本?</s> Paris 🎉 is large"
    (encoding,) = slow.encode_batch([text])
    covered = [0] * len(text)
    for start, end in encoding.offsets:
        covered[start:end] = [1] * (end - start)
    assert all(covered)
    assert text[slice(*encoding.token_to_chars(encoding.char_to_token(text.index("日"))))] == "日"
    assert encoding.char_to_token(len(text)) is None

    start = text.index("日")
    document = Rendered(text, [(start, text.index("</s>") + 4)])
    batch = to_arrays(encode(slow, [document]), [document])
    trained = [slow.pieces.id_to_piece(i) for i in batch.ids[batch.mask == 1].tolist()]
    assert trained == ["<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", "<0x9C>", "<0xAC>", "?", "</s>"]


def test_added_tokens_are_found_in_the_text_and_strip_its_blanks(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {"340": {"content": "<mask>", "lstrip": True, "rstrip": True, "special": True}}}
    slow = load_tokenizer(write_sentencepiece(tmp_path / "hf", legacy=True, **config), slow=True)
    (encoding,) = slow.encode_batch(["France  <mask>  is"])
    pieces = [i if i == 340 else slow.pieces.id_to_piece(i) for i in encoding.ids]
    at = pieces.index(340)
    assert "".join(map(str, pieces[:at])) == "▁France"
    assert pieces[at + 1 :] == ["▁is"]
    assert encoding.offsets[-1] == (16, 18)


@pytest.mark.parametrize(
    ("files", "slow", "named"),
    [
        ({}, False, "no tokenizer.json and no tokenizer.model"),
        ({}, True, "leave --slow-tokenizer out"),
        ({"tokenizer.model": b"text, no model"}, False, "not a sentencepiece model"),
        ({"tokenizer.model": b""}, True, "not a sentencepiece model"),
        ({"tokenizer.json": b"{}"}, False, "not a readable tokenizer"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(
    tmp_path: Path, files: dict[str, bytes], slow: bool, named: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=named):
        load_tokenizer(tmp_path, slow=slow)


def test_a_slow_tokenizer_with_ids_beyond_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "hf", legacy=True, pad_token="<pad>")
    (folder / "config.json").write_text('{"vocab_size": 340}')
    with pytest.raises(VocabularyError, match="'<pad>' with id 340"):
        require_vocabulary(load_tokenizer(folder, slow=True).get_vocab(), folder)


def test_a_bare_sentencepiece_model_names_its_special_tokens(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "bare")
    assert special_tokens(folder) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    template = ChatTemplate(find_template("llama2", folder), special_tokens(folder))
    assert template.text([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]).endswith("a </s>")

    model = require_sentencepiece(folder / "tokenizer.model")
    model.trainer_spec.eos_id = -1
    model.trainer_spec.bos_piece = "<no such piece>"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    assert special_tokens(folder) == {"unk_token": "<unk>"}


def test_what_the_files_say_of_special_tokens_counts_more_than_the_sentencepiece_model(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path / "hf", legacy=True)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "▁is", "bos_token": null}', encoding="utf-8")
    assert special_tokens(folder) == {"eos_token": "▁is", "unk_token": "<unk>"}


@pytest.mark.parametrize("slow", [False, True])
def test_documents_of_a_bare_sentencepiece_model_end_with_its_eos_token(tmp_path: Path, slow: bool) -> None:
    from megatron_ext.data.tokenization import tokenize

    folder, out = write_sentencepiece(tmp_path / "bare"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "hello there"}\n')
    tokenize([tmp_path / "a.jsonl"], folder, out, events=Events(), append_eod=True, slow_tokenizer=slow)
    eos = load_tokenizer(folder, slow=slow).token_to_id("</s>")
    assert Idxmap(out / "tokens")[0].tolist()[-1] == eos


def test_the_file_tells_every_id_or_leaves_it_to_tokenizers(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path / "plain")
    path = folder / "tokenizer.json"
    assert Definition.read(path).vocabulary == load_tokenizer(folder).get_vocab(with_added_tokens=True)
    facts = json.loads(path.read_text())
    facts["added_tokens"].append({**facts["added_tokens"][-1], "content": "<far>", "id": 100_000})
    facts["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(facts))
    definition = Definition.read(path)
    assert definition.vocabulary is None
    assert json.loads(definition.text)["truncation"] is None
    found = read_vocabulary(folder, definition, lambda: load_tokenizer(folder))
    assert found["<far>"] == load_tokenizer(folder).token_to_id("<far>")
    lacks = write_chat_tokenizer(tmp_path / "lacks", added_tokens_decoder={"9": {"content": "<far>"}})
    with pytest.raises(VocabularyError, match="'<far>' as id 9"):
        read_vocabulary(lacks, Definition.read(lacks / "tokenizer.json"), lambda: load_tokenizer(lacks))
