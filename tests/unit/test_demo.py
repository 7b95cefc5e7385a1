"""demo://routing: the same bytes from the same seed, and a benchmark that cannot be passed by remembering."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from megatron_ext.demo import generate, routing
from megatron_ext.errors import ConfigError
from megatron_ext.folders import digest_file


def digests(folder):
    return {str(p.relative_to(folder)): digest_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo as the flow's first stage makes it: a subprocess, here with a fixed hash seed and one thread."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "out").mkdir()
    job = {
        "job": "demo",
        "config": {"name": "routing", "seed": 1},
        "out": str(folder / "out"),
        "events": str(folder / "events"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "megatron_ext.worker", str(folder / "job.json")], env=environment, check=True)
    return folder / "out"


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    generate("routing", 1, folder)
    return folder


def test_the_same_seed_gives_the_same_bytes_in_two_processes(demo, again):
    assert digests(demo) == digests(again)
    assert set(digests(demo)) >= {
        "model/config.json", "model/generation_config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/chat_template.jinja", "data/train.jsonl", "tasks/heldout.jsonl", "tasks/demo_routing.yaml",
    }  # fmt: skip


def test_another_seed_gives_another_demo():
    assert routing.rows(1) != routing.rows(2)


def test_a_rerun_clears_what_a_killed_attempt_left(demo, again):
    (again / "tasks" / "half.jsonl").write_text("{")
    generate("routing", 1, again)
    assert digests(demo) == digests(again)


def test_no_heldout_pair_or_message_is_in_the_training_data(demo):
    train, _ = routing.rows(1)
    heldout = rows(demo / "tasks" / "heldout.jsonl")
    assert not {(r["thing"], r["complaint"]) for r in train} & {(r["thing"], r["complaint"]) for r in heldout}
    written = {row["messages"][0]["content"] for row in rows(demo / "data" / "train.jsonl")}
    assert written == {r["message"] for r in train}
    assert not written & {r["message"] for r in heldout}


def test_every_word_of_the_heldout_messages_was_seen_in_training(demo):
    train, heldout = routing.rows(1)
    for part in ("thing", "complaint"):
        assert {r[part] for r in heldout} <= {r[part] for r in train}
    assert {w for r in heldout for w in r["message"].split()} <= {w for r in train for w in r["message"].split()}


def test_departments_are_equally_frequent_so_guessing_one_scores_a_quarter(demo):
    counts = Counter(row["department"] for row in rows(demo / "tasks" / "heldout.jsonl"))
    assert set(counts.values()) == {routing.HELDOUT_ROWS // 4}
    answers = Counter(row["messages"][1]["content"] for row in rows(demo / "data" / "train.jsonl"))
    assert set(answers.values()) == {routing.TRAIN_ROWS // 4}


def test_naming_a_departments_thing_does_not_give_the_answer_away():
    """Whoever only knows which thing belongs to which department must guess between two of them, mostly."""
    _, heldout = routing.rows(1)
    ambiguous = sum(
        len(
            {name for name, things in routing.THINGS.items() if any(f"My {t} " in m or f"my {t} " in m for t in things)}
        )
        == 2
        for m in (row["message"] for row in heldout)
    )
    assert 0.7 < ambiguous / len(heldout) < 0.9


def test_every_seed_holds_out_a_fifth_of_the_pairs_and_no_thing_or_complaint_whole():
    for seed in range(5):
        seen, unseen = routing.split_pairs(random.Random(seed))
        assert len(unseen) * 4 == len(seen)
        for i in (1, 2):
            assert {p[i] for p in unseen} <= {p[i] for p in seen}


def test_any_text_survives_the_tokenizer_and_the_model_has_room_for_it(demo):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    for text in ("Größe, naïve café — 中文 \U0001f600\n\ttabs", "x = {'a': [1, 2]}  # <|im_end"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    config = AutoConfig.from_pretrained(demo / "model")
    assert config.vocab_size == len(tokenizer)
    assert config.max_position_embeddings >= 1024


def test_only_the_answer_and_its_end_marker_are_marked_for_training(demo):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    row = rows(demo / "data" / "train.jsonl")[0]["messages"]
    encoded = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(trained) == row[1]["content"] + "<|im_end|>"
    whole = tokenizer.decode(encoded["input_ids"])
    assert (
        whole
        == f"<|im_start|>user\n{row[0]['content']}<|im_end|>\n<|im_start|>assistant\n{row[1]['content']}<|im_end|>\n"
    )


def test_an_unknown_demo_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="unknown demo 'rooting'; did you mean 'routing'"):
        generate("rooting", 1, tmp_path)
