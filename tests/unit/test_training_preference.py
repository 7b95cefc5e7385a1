"""Preference losses are the published formulas, worked by hand on a few numbers."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ext.config import PreferenceConfig
from megatron_ext.training.preference import preference_losses

POLICY = [[-10.0, -12.0], [-8.0, -6.0]]
REFERENCE = [[-11.0, -11.5], [-7.0, -7.5]]
LENGTHS = [[4, 5], [2, 6]]


def losses(**config) -> tuple[list[float], list[list[float]]]:
    found, rewards = preference_losses(
        torch.tensor(POLICY), torch.tensor(REFERENCE), torch.tensor(LENGTHS), PreferenceConfig(**config)
    )
    return found.tolist(), rewards.tolist()


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def margins(beta: float) -> list[float]:
    """beta ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))), by hand: 1 + 0.5, and -1 - 1.5."""
    return [beta * 1.5, beta * -2.5]


def test_sigmoid_is_dpo() -> None:
    found, rewards = losses(beta=0.3)
    assert found == pytest.approx([-log_sigmoid(m) for m in margins(0.3)])
    assert rewards == [pytest.approx([0.3, -0.15]), pytest.approx([-0.3, 0.45])]


def test_label_smoothing_counts_the_pair_the_other_way_round_too() -> None:
    expected = [-0.9 * log_sigmoid(m) - 0.1 * log_sigmoid(-m) for m in margins(0.3)]
    assert losses(beta=0.3, label_smoothing=0.1)[0] == pytest.approx(expected)


def test_ipo_pulls_the_mean_log_ratio_a_token_to_one_over_two_beta() -> None:
    ratios = [1 / 4 - -0.5 / 5, -1 / 2 - 1.5 / 6]
    assert losses(loss="ipo", beta=0.3)[0] == pytest.approx([(r - 1 / 0.6) ** 2 for r in ratios])


def test_hinge_ends_at_a_margin_of_one() -> None:
    assert losses(loss="hinge", beta=0.3)[0] == pytest.approx([1 - 0.45, 1 + 0.75])
    assert losses(loss="hinge", beta=1.0)[0] == pytest.approx([0.0, 3.5])


def test_the_sft_term_is_the_chosen_answers_mean_negative_log_likelihood() -> None:
    plain, _ = losses()
    assert losses(sft_weight=0.5)[0] == pytest.approx([plain[0] + 0.5 * 10 / 4, plain[1] + 0.5 * 8 / 2])


def test_label_smoothing_without_sigmoid_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing belongs to loss sigmoid"):
        PreferenceConfig(loss="ipo", label_smoothing=0.1)
