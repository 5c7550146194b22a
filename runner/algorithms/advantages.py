"""From rewards to advantages: one number per sample, spread over its response tokens. The estimators have the formulas.

GRPO            A_i = (r_i - mean(group)) / (std(group) + 1e-6)      DeepSeekMath, arXiv 2402.03300, section 4.1.2
GRPO, no std    A_i = r_i - mean(group)                              Dr. GRPO, arXiv 2503.20783, section 3
REINFORCE++     A_i = (r_i - mean(tokens)) / sqrt(var(tokens) + 1e-8) arXiv 2501.03262v9, REINFORCE++ without a baseline
GSPO, CISPO     the GRPO advantage (arXiv 2507.18071, section 4.1; arXiv 2506.13585, section 3.1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runner.algorithms.estimators import estimator_of
from runner.config.schema import AlgorithmConfig
from runner.data import Sample
from runner.errors import UserError


def compute_advantages(algorithm: AlgorithmConfig, groups: Sequence[Sequence[Sample]]) -> list[torch.Tensor]:
    """Advantages [R] fp32 per sample, in the order of the groups laid end to end.

    `groups` holds the samples of one prompt each; every sample needs a finite reward (UserError otherwise). Tokens
    outside the loss mask get the sample's advantage too: the mask is applied in the loss.
    """
    rewards = [torch.tensor([_reward(sample) for sample in group], dtype=torch.float32) for group in groups]
    counts = [torch.tensor([int(sample.loss_mask.sum()) for sample in group]) for group in groups]
    values = estimator_of(algorithm.estimator).advantages(algorithm, rewards, counts)
    return [
        torch.full((sample.response_length,), float(value))
        for group, row in zip(groups, values, strict=True)
        for sample, value in zip(group, row, strict=True)
    ]


def _reward(sample: Sample) -> float:
    if sample.reward is None or sample.reward != sample.reward or abs(sample.reward) == float("inf"):
        raise UserError(
            f"sample {sample.sample_index} of prompt {sample.prompt_id} has reward {sample.reward}",
            fix="the task's reward function must return a finite number for every sample",
        )
    return float(sample.reward)
