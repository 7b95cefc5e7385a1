"""How logits are judged, which prompts are asked, and how the first layer that differs is found."""

import pytest
import torch
from tiny import write_tokenizer

from megatron_ext.families.base import Architecture
from megatron_ext.weights.prompts import BEYOND, KEPT, Prompt, make_prompts
from megatron_ext.weights.verify_logits import first_layer_that_differs, judge

ARCHITECTURE = Architecture(
    num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_query_groups=2, kv_channels=4,
    vocab_size=300, max_position_embeddings=4096, layernorm_epsilon=1e-6,
)  # fmt: skip
NAN, INF = float("nan"), float("inf")


def judged(theirs: list[list[float]], ours: list[list[float]]):
    """Two prompts of one position each."""
    prompts = [Prompt(name, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)) for name in "ab"]
    sides = [{p.name: torch.tensor([[row]]) for p, row in zip(prompts, rows, strict=True)} for rows in (theirs, ours)]
    return judge(prompts, {"transformers": sides[0], "megatron-core": sides[1]})


@pytest.mark.parametrize(
    ("ours", "fault"),
    [
        ([[1.0, 2.0, 10.0], [4.0, 3.0, 0.0]], None),
        ([[1.0009, 2.0, 10.0], [4.0, 3.0, 0.0]], None),
        ([[1.0, 2.0, 10.0, 99.0], [4.0, 3.0, 0.0, 99.0]], None),  # padding of the vocabulary
        ([[1.0, 2.0, 10.0], [4.0, 3.0, 0.0011]], "prompt 'b', position 0, token 2: 0 by transformers, 0.0011"),
        ([[NAN, 2.0, 10.0], [4.0, 3.0, 0.0]], "prompt 'a', position 0, token 0"),
        ([[1.0, 2.0, 10.0], [INF, 3.0, 0.0]], "prompt 'b', position 0, token 0"),
    ],
)
def test_a_difference_beyond_a_ten_thousandth_of_the_largest_logit_is_a_fault(ours, fault):
    verdict = judged([[1.0, 2.0, 10.0], [4.0, 3.0, 0.0]], ours)
    assert (verdict.fault is None) == (fault is None)
    assert fault is None or fault in verdict.fault
    assert fault is None or verdict.prompt.name == fault[8]


@pytest.mark.parametrize("value", [NAN, INF])
def test_logits_that_are_not_numbers_do_not_equal_themselves(value):
    rows = [[value, 2.0, 10.0], [4.0, 3.0, 0.0]]
    assert judged(rows, rows).fault


def test_two_tokens_may_change_places_only_in_a_near_tie():
    near = judged([[1.0, 10.0], [4.00005, 4.0]], [[1.0, 10.0], [4.0, 4.00005]])
    assert (near.fault, near.top1_differs) == (None, 1)
    clear = judged([[1.0, 10.0], [4.0005, 4.0]], [[1.0, 10.0], [4.0, 4.0005]])
    assert "token 0 by transformers, 1 by megatron-core" in clear.fault
    assert clear.prompt.name == "b"


@pytest.mark.parametrize("place", ["embedding", "attention of layer 1", "layer 0", "final norm", None])
def test_the_first_place_that_differs_is_named_and_later_ones_are_not(place):
    places = ["embedding", "attention of layer 0", "layer 0", "attention of layer 1", "layer 1", "final norm"]
    theirs = {name: torch.ones(1, 2, 8) for name in places}
    broken = places[places.index(place) :] if place else []
    ours = {name: torch.ones(1, 2, 8) + (0.5 if name in broken else 5e-5) for name in places}
    sentence = first_layer_that_differs({"transformers": theirs, "megatron-core": ours}, 2)
    assert (place or "output layer") in sentence
    assert not [other for other in places if f": {other}," in sentence and other != place]
    assert place is None or "by 0.5 at most" in sentence


def test_prompts_are_always_the_same_and_cover_the_vocabulary(tmp_path):
    prompts = {prompt.name: prompt for prompt in make_prompts(ARCHITECTURE, write_tokenizer(tmp_path))}
    again = {prompt.name: prompt for prompt in make_prompts(ARCHITECTURE, tmp_path)}
    assert list(prompts) == ["random", "whole vocabulary", "long", "text"]
    assert all(torch.equal(prompts[name].tokens, again[name].tokens) for name in prompts)
    assert {0, 299} <= set(prompts["whole vocabulary"].tokens[0].tolist())
    assert max(int(prompt.tokens.max()) for prompt in prompts.values()) < 300


def test_a_sliding_window_is_passed_and_positions_behind_it_are_compared(tmp_path):
    windowed = ARCHITECTURE.model_copy(update={"window_size": 1000})
    prompt = next(p for p in make_prompts(windowed, tmp_path) if p.name == "beyond the window")
    assert prompt.tokens.shape == (1, 1000 + BEYOND)
    assert len(prompt.positions) == KEPT
    assert sum(int(position) >= 1000 for position in prompt.positions) >= KEPT // 2
    assert torch.equal(prompt.positions, prompt.positions.sort().values)


def test_no_prompt_is_longer_than_the_model_can_read(tmp_path):
    short = ARCHITECTURE.model_copy(update={"max_position_embeddings": 40, "window_size": 30})
    assert max(prompt.tokens.shape[1] for prompt in make_prompts(short, write_tokenizer(tmp_path))) == 40
