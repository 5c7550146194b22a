"""GRPO: advantages relative to the group, DeepSeekMath, arXiv 2402.03300, section 4.1.2; the clipped surrogate per token."""

from __future__ import annotations

from runner.algorithms.estimators import MAX_LOG_RATIO, Estimator, Rows, TokenLoss
from runner.config.schema import AlgorithmConfig


class Grpo(Estimator):
    dual_clip = True

    def loss(self, algorithm: AlgorithmConfig, rows: Rows) -> TokenLoss:
        """max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logp - old_logp).

        PPO, arXiv 1707.06347, equation 7; clip-higher (two bounds): DAPO, arXiv 2503.14476, section 3.1. `dual_clip` c above 0
        bounds the loss of a negative advantage by -A c: dual-clip PPO, Ye et al. 2020, arXiv 1912.09729, equation 5.
        """
        import torch

        advantages = rows.advantages
        ratio = torch.exp((rows.logprobs - rows.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        plain = -advantages * ratio
        clipped = -advantages * ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
        loss, took = torch.maximum(plain, clipped), clipped > plain
        if algorithm.dual_clip:
            bound = -advantages * algorithm.dual_clip
            above = (advantages < 0) & (loss > bound)
            loss, took = torch.where(above, bound, loss), took | above
        return TokenLoss(loss, took.detach())


ESTIMATOR = Grpo()
