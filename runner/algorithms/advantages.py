"""From rewards to advantages: one number per sample, spread over its response tokens.

    GRPO            A_i = (r_i - mean(group)) / (std(group) + 1e-6)      DeepSeekMath, arXiv 2402.03300, section 4.1.2
    GRPO, no std    A_i = r_i - mean(group)                              Dr. GRPO, arXiv 2503.20783, section 3
    REINFORCE++     A_i = (r_i - mean(tokens)) / sqrt(var(tokens) + 1e-8) arXiv 2501.03262v9, REINFORCE++ without a baseline
    GSPO, CISPO     the GRPO advantage (arXiv 2507.18071, section 4.1; arXiv 2506.13585, section 3.1)

REINFORCE++ takes mean and variance over the tokens of the whole rollout, those inside the loss masks: a long answer counts more
often than a short one. The variance is the unbiased one and the epsilon stands under the root, as in masked_whiten of verl 0.9,
SkyRL 0.3 and slime. It differs from its paper in one thing: the KL penalty is a loss term (`algorithm.kl_coef`) and not part
of the reward, so a sample has one advantage for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runner.config.schema import AlgorithmConfig, Estimator
from runner.data import Sample
from runner.errors import UserError

GROUP_EPSILON = 1e-6
TOKEN_EPSILON = 1e-8


def compute_advantages(algorithm: AlgorithmConfig, groups: Sequence[Sequence[Sample]]) -> list[torch.Tensor]:
    """Advantages [R] fp32 per sample, in the order of the groups laid end to end.

    `groups` holds the samples of one prompt each; every sample needs a finite reward (UserError otherwise). Tokens
    outside the loss mask get the sample's advantage too: the mask is applied in the loss.
    """
    rewards = [torch.tensor([_reward(sample) for sample in group], dtype=torch.float32) for group in groups]
    if algorithm.estimator is Estimator.reinforce_pp:
        counts = [torch.tensor([int(sample.loss_mask.sum()) for sample in group]) for group in groups]
        values = token_whitened(rewards, counts, by_std=algorithm.normalize_by_std)
    else:
        values = [group_normalized(row, by_std=algorithm.normalize_by_std) for row in rewards]
    return [
        torch.full((sample.response_length,), float(value))
        for group, row in zip(groups, values, strict=True)
        for sample, value in zip(group, row, strict=True)
    ]


def group_normalized(rewards: torch.Tensor, *, by_std: bool) -> torch.Tensor:
    """GRPO: rewards [G] fp32 of one prompt -> advantages [G]. The unbiased std, as in the public implementations.

    A group of one sample, or of equal rewards, gives zeros.
    """
    centred = rewards - rewards.mean()
    if not by_std:
        return centred
    if len(rewards) == 1 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return centred / (rewards.std() + GROUP_EPSILON)


def token_whitened(rewards: Sequence[torch.Tensor], counts: Sequence[torch.Tensor], *, by_std: bool) -> list[torch.Tensor]:
    """REINFORCE++: rewards [G] fp32 and counted tokens [G] of each group -> advantages [G], whatever the groups.

    Every token has its sample's reward; mean and unbiased variance run over tokens. Equal rewards everywhere give zeros.
    """
    values, weights = torch.cat(list(rewards)).double(), torch.cat(list(counts)).double()
    counted, total = values[weights > 0], float(weights.sum())
    if len(counted) == 0 or bool((counted == counted[0]).all()):
        return [torch.zeros_like(row) for row in rewards]
    centred = values - (values * weights).sum() / total
    if by_std:
        centred = centred * torch.rsqrt((centred.square() * weights).sum() / (total - 1.0) + TOKEN_EPSILON)
    return list(centred.float().split([len(row) for row in rewards]))


def _reward(sample: Sample) -> float:
    if sample.reward is None or sample.reward != sample.reward or abs(sample.reward) == float("inf"):
        raise UserError(
            f"sample {sample.sample_index} of prompt {sample.prompt_id} has reward {sample.reward}",
            fix="the task's reward function must return a finite number for every sample",
        )
    return float(sample.reward)
