"""CISPO: arXiv 2506.13585 (MiniMax-M1), equations 4-5; the GRPO advantage (section 3.1)."""

from __future__ import annotations

from runner.algorithms.estimators import MAX_LOG_RATIO, Estimator, Rows, TokenLoss
from runner.config.schema import AlgorithmConfig


class Cispo(Estimator):
    def loss(self, algorithm: AlgorithmConfig, rows: Rows) -> TokenLoss:
        """REINFORCE weighted by the clipped, detached ratio: -sg[clip(r, 1 - low, 1 + high)] A logp; no token loses its gradient.

        The paper sets no lower bound: clip_low=1.
        """
        import torch

        ratio = torch.exp((rows.logprobs - rows.old_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        weight = ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
        return TokenLoss(-weight * rows.advantages * rows.logprobs, weight != ratio)


ESTIMATOR = Cispo()
