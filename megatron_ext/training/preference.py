"""Preference losses on summed log-probabilities: DPO's sigmoid, IPO and hinge. No model inside.

Legend: P pairs; column 0 is the chosen answer, column 1 the rejected one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_ext.config import PreferenceConfig


def preference_losses(
    policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, config: PreferenceConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each pair, and the rewards ``beta * (policy - reference)`` of its two answers.

    Args:
        policy, reference: (P, 2) sums of the log-probabilities of the trained tokens of each answer.
        lengths: (P, 2) trained tokens of each answer; IPO takes means over them, as in TRL.

    Returns:
        (P,) losses, (P, 2) rewards.

    Source: DPO, https://arxiv.org/abs/2305.18290, equation 7, with the label smoothing of cDPO,
    https://ericmitchell.ai/cdpo.pdf; IPO, https://arxiv.org/abs/2310.12036, equation 17; hinge: SLiC,
    https://arxiv.org/abs/2305.10425; as TRL's DPOTrainer computes them.
    """
    rewards = config.beta * (policy - reference)
    if config.loss == "ipo":
        ratios = (policy - reference) / lengths
        losses = (ratios[:, 0] - ratios[:, 1] - 1 / (2 * config.beta)) ** 2
    else:
        margins = rewards[:, 0] - rewards[:, 1]
        if config.loss == "hinge":
            losses = F.relu(1 - margins)
        else:
            smoothing = config.label_smoothing
            losses = -F.logsigmoid(margins) * (1 - smoothing) - F.logsigmoid(-margins) * smoothing
    if config.sft_weight:
        losses = losses - config.sft_weight * policy[:, 0] / lengths[:, 0]
    return losses, rewards
