"""REINFORCE++ without a baseline, arXiv 2501.03262v9: advantages whitened over tokens, and the loss of GRPO.

Mean and variance are taken over the tokens of the whole rollout, those inside the loss masks: a long answer counts more often
than a short one. The variance is the unbiased one and the epsilon stands under the root, as in masked_whiten of verl 0.9,
SkyRL 0.3 and slime. It differs from its paper in one thing: the KL penalty is a loss term (`algorithm.kl_coef`) and not part
of the reward, so a sample has one advantage for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.algorithms.estimators.grpo import Grpo
from runner.config.schema import AlgorithmConfig

if TYPE_CHECKING:
    import torch

TOKEN_EPSILON = 1e-8


class ReinforcePlusPlus(Grpo):
    compares_group = False

    def advantages(
        self, algorithm: AlgorithmConfig, rewards: Sequence[torch.Tensor], counts: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        return token_whitened(rewards, counts, by_std=algorithm.normalize_by_std)


def token_whitened(rewards: Sequence[torch.Tensor], counts: Sequence[torch.Tensor], *, by_std: bool) -> list[torch.Tensor]:
    """(r - mean) / sqrt(var + 1e-8): rewards [G] fp32 and counted tokens [G] of each group -> advantages [G].

    Every token has its sample's reward; mean and unbiased variance run over tokens. Equal rewards everywhere give zeros.
    """
    import torch

    values, weights = torch.cat(list(rewards)).double(), torch.cat(list(counts)).double()
    counted, total = values[weights > 0], float(weights.sum())
    if len(counted) == 0 or bool((counted == counted[0]).all()):
        return [torch.zeros_like(row) for row in rewards]
    centred = values - (values * weights).sum() / total
    if by_std:
        centred = centred * torch.rsqrt((centred.square() * weights).sum() / (total - 1.0) + TOKEN_EPSILON)
    return list(centred.float().split([len(row) for row in rewards]))


ESTIMATOR = ReinforcePlusPlus()
