"""GSPO: the ratio and its clip per sequence, arXiv 2507.18071; the GRPO advantage (section 4.1)."""

from __future__ import annotations

from runner.algorithms.estimators import Estimator, Rows, TokenLoss, inside
from runner.config.schema import AlgorithmConfig

MAX_LOG_SEQUENCE_RATIO = 10.0  # nats; ratios are means over tokens


class Gspo(Estimator):
    def loss(self, algorithm: AlgorithmConfig, rows: Rows) -> TokenLoss:
        """Sequence-level ratio s_i = exp(mean over the sequence's tokens of (logp - old_logp)), clipped per sequence.

        Equations 5-7, in the token form GSPO-token (equations 13-14): s_it = sg[s_i] * exp(logp - sg[logp]) has the value of
        s_i, and with equal advantages within a sequence the gradient of GSPO.
        """
        import torch

        logprobs, ids = rows.logprobs, rows.sample_ids
        zeros = torch.zeros(rows.num_samples, device=logprobs.device)
        count = zeros.index_add(0, ids, rows.mask.to(logprobs.dtype)).clamp_min(1.0)
        difference = inside(rows.mask, (logprobs - rows.old_logprobs).detach())
        mean = zeros.index_add(0, ids, difference) / count
        ratio = torch.exp((mean[ids] + (logprobs - logprobs.detach())).clamp(max=MAX_LOG_SEQUENCE_RATIO))
        plain = -rows.advantages * ratio
        clipped = -rows.advantages * ratio.clamp(1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
        return TokenLoss(torch.maximum(plain, clipped), (clipped > plain).detach())


ESTIMATOR = Gspo()
