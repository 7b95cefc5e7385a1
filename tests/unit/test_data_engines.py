"""The fast engine: the reference's ids on tokenizers of every kind, and what happens where it cannot give them."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from chat_data import CHATS, SPECIAL, write_chat_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from megatron_ext.data import engine_proof
from megatron_ext.data.chat_templates import find_template, special_tokens
from megatron_ext.data.definition import Definition
from megatron_ext.data.encoding import MaskMaker, encode_by_reference
from megatron_ext.data.engine_proof import Comparison, EngineDiffersError, first_difference, prove, stress_texts
from megatron_ext.data.engines import GigatokenEngine, Ids, ReferenceEngine, Texts, refusal, unsafe_characters
from megatron_ext.data.formats import Conversation
from megatron_ext.data.rendering import ChatTemplate, Rendered
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ChatTemplateError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KINDS = ("gpt2", "llama3", "qwen2", "llama2", "mistral")


def tokenizer_of(folder, kind):
    """A small tokenizer as GPT-2 (byte-level), Llama-3 (which takes words that are tokens whole), Qwen2 (NFC), Llama-2
    (byte fallback, spaces by a normalizer) or newer files of Mistral (byte fallback, spaces by Metaspace) have it.
    """
    tokenizer = load_tokenizer(write_chat_tokenizer(folder, "metaspace" if kind in ("llama2", "mistral") else "bytes"))
    if kind == "llama3":
        facts = json.loads(tokenizer.to_str())
        facts["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(facts))
    if kind == "mistral":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    if kind in ("llama3", "qwen2"):
        pattern = Regex(LLAMA3 if kind == "llama3" else QWEN2)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def engines_of(tokenizer):
    reference = ReferenceEngine(tokenizer)
    return GigatokenEngine(Definition.of(tokenizer.to_str().encode()), reference), reference


def defined(facts):
    return Definition.of(json.dumps(facts).encode())


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp(request.param), request.param)


def same(texts, engine, reference):
    texts = Texts.of_strings(texts)
    return first_difference(engine.encode(texts), reference.encode(texts)) is None


def test_both_engines_agree_on_the_stress_set(tokenizer):
    engine, reference = engines_of(tokenizer)
    texts = list(stress_texts(tokenizer))
    chosen = texts[:6000] + texts[6000::9]  # all mixtures and tokens, and every ninth character; `prove` takes all
    assert len(texts) > 80_000
    assert all(any(token in text for text in chosen[:300]) for token in SPECIAL)
    assert same(chosen, engine, reference)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * (1 << 20),
        "".join(random.Random(1).choices("日本語中", k=350_000)),
        "<s></s> <s>x<|im_end|>",
        "\x00\x7f\ufffd",
    ],
    ids=["empty", "1 MB of one letter", "1 MB without a space", "special tokens", "control"],
)
def test_both_engines_agree_on(tokenizer, text):
    engine, reference = engines_of(tokenizer)
    assert same([text, "before", text, ""], engine, reference)


def test_the_first_texts_which_are_encoded_one_by_one_get_the_ids_of_all_others(tokenizer):
    engine, reference = engines_of(tokenizer)
    texts = ["one", "", "<s> two</s>", "日本 🎉 drei\n", "a" * 70_000]
    assert same(texts, engine, reference)
    assert same(texts, engine, reference)


def test_threads_that_share_an_engine_get_the_ids_of_one(tokenizer):
    reference = ReferenceEngine(tokenizer)
    engine = GigatokenEngine(Definition.of(tokenizer.to_str().encode()), reference, threads=2)
    parts = [Texts.of_strings([f"part {part} text {n} 日本 {part * n}" for n in range(300)]) for part in range(16)]
    with ThreadPoolExecutor(4) as pool:
        for part, found in zip(parts, pool.map(engine.encode, parts), strict=True):
            assert first_difference(found, reference.encode(part)) is None


def test_a_tokenizer_is_proven_once(tmp_path, monkeypatch):
    tokenizer = tokenizer_of(tmp_path, "qwen2")
    definition, reference = Definition.of(tokenizer.to_str().encode()), ReferenceEngine(tokenizer)
    proof = prove(definition, reference)
    assert (proof.why, proof.texts > 80_000) == ("", True)
    monkeypatch.setattr(engine_proof, "_prove", None)  # another proof would fail
    assert prove(definition, reference) == proof


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(UnicodeEncodeError):
        Texts.of_strings(["half \ud83d of a pair"])


def test_characters_on_which_normalizers_may_differ_go_to_the_reference(tmp_path):
    engine, reference = engines_of(tokenizer_of(tmp_path, "qwen2"))
    newer = "\U000113c2\U000113c2"  # composes since Unicode 16
    texts = ["e\u0301 plain", newer, "", "日本 🎉", f"x {newer} e\u0323\u0301", "end"]
    assert same(texts, engine, reference)
    assert engine.encode(Texts.of_strings(texts)).from_reference == 2
    engine._unsafe = None
    assert not same(texts, engine, reference), "the engine itself would have been wrong here"


def test_no_character_of_ordinary_text_is_left_to_the_reference():
    unsafe = re.compile(unsafe_characters())
    assert unsafe.search("\u0f00\U000113c2")
    for text in ("naïve e\u0301", "日本語 한국어", "русский", "हिन्दी ไทย tiếng Việt", "עִבְרִית العَرَبِيَّة", "👩‍👩‍👧 🇫🇷 ☃️ ½"):
        assert not unsafe.search(text), text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer NFKC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece, not BPE"),
    ],
)
def test_tokenizers_of_other_kinds_are_not_tried(tmp_path, change, reason):
    definition = json.loads(tokenizer_of(tmp_path, "gpt2").to_str())
    assert refusal(defined(definition)) is None
    assert reason in refusal(defined(definition | change))


def test_a_tokenizer_that_drops_merges_at_random_is_not_tried(tmp_path):
    definition = json.loads(tokenizer_of(tmp_path, "gpt2").to_str())
    definition["model"]["dropout"] = 0.1
    assert "at random" in refusal(defined(definition))


def test_a_difference_in_the_data_is_found_wherever_it_is_compared(tmp_path):
    engine, reference = engines_of(tokenizer_of(tmp_path, "gpt2"))
    texts = Texts.of_strings([f"document {n}" for n in range(5000)])
    found = engine.encode(texts)
    rows = np.arange(1, 5001)
    whole = Comparison.of(texts, found, rows, "a.jsonl", first=engine_proof.FIRST_BYTES)
    sample = Comparison.of(texts, found, rows, "a.jsonl")
    whole.require_equal(reference)
    sample.require_equal(reference)
    assert whole.texts.count == 5000
    assert 2 <= sample.texts.count <= 10
    wrong = found.values.copy()
    at = int(np.flatnonzero(engine_proof.sampled(rows))[1])
    wrong[int(found.lengths[:at].sum())] += 1
    with pytest.raises(EngineDiffersError, match=f"a.jsonl, row {at + 1}$"):
        Comparison.of(texts, Ids(wrong, found.lengths), rows, "a.jsonl").require_equal(reference)


def test_memory_is_given_back_where_words_never_repeat(tmp_path):
    engine, _ = engines_of(tokenizer_of(tmp_path, "gpt2"))
    engine._memory = 0
    texts = Texts.of_strings(["x" * 1000 + f" {n}" for n in range(20_000)])
    made = []
    renew = engine._renew
    engine._renew = lambda: (made.append(1), renew())
    first, second = engine.encode(texts), engine.encode(texts)
    assert made == [1]
    assert first_difference(first, second) is None


# --- masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "llama2", "llama3", "alpaca", "mistral-instruct"])
def test_masks_from_bytes_are_those_of_the_reference(tokenizer, tmp_path, template):
    folder = write_chat_tokenizer(tmp_path)
    renderer = ChatTemplate(find_template(template, folder), special_tokens(folder))
    documents = []
    for messages in CHATS:
        try:
            documents.append(renderer.render(Conversation(messages)))
        except ChatTemplateError:  # some templates take no such turns
            continue
    engine, reference = engines_of(tokenizer)
    masks = MaskMaker(engine, reference)
    texts = Texts.of_strings(document.text for document in documents)
    ids = engine.encode(texts)
    expected = encode_by_reference(reference, documents)
    assert ids.values.tolist() == expected.ids.tolist()
    assert masks.mask(documents, texts, ids).tolist() == expected.mask.tolist()
    _, known = masks._places(texts, ids)
    composes = "NFC" in tokenizer.to_str()
    assert known.tolist() == [not (composes and "e\u0301" in document.text) for document in documents]


def test_spans_inside_tokens_and_trimmed_offsets_are_the_references(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "gpt2")
    for trimmed in (False, True):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
        engine, reference = engines_of(tokenizer)
        masks = MaskMaker(engine, reference)
        text = "the capital  of France 日本 is\n\n Paris."
        documents = [
            Rendered(text, [(start, end)]) for start in range(len(text)) for end in range(start + 1, len(text) + 1)
        ]
        texts = Texts.of_strings(document.text for document in documents)
        found = masks.mask(documents, texts, engine.encode(texts))
        assert found.tolist() == encode_by_reference(reference, documents).mask.tolist()


def test_reference_parts_of_any_size_give_the_same(tmp_path, monkeypatch):
    tokenizer = tokenizer_of(tmp_path, "gpt2")
    texts = Texts.of_strings(["", "one", "two words", "", "x" * 50, "end"])
    whole = ReferenceEngine(tokenizer).encode(texts)
    monkeypatch.setattr("megatron_ext.data.engines.REFERENCE_BYTES", 4)
    assert first_difference(ReferenceEngine(tokenizer).encode(texts), whole) is None
