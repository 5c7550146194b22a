"""Policy losses, KL estimators and entropy over a flat row of response tokens. Pure functions of tensors.

Shape legend: N response tokens of a micro-batch laid end to end, S samples in it.

Every loss is a value per token; `aggregation.py` says what tokens weigh against each other and what their sum is divided by.

What lies outside the loss mask is replaced by zero before anything is computed with it (`inside`): infinity times zero is not
a number, in a gradient too. Differences of logprobs are clamped to 20 nats before their exponential, and k3 to 10, as verl 0.9
and SkyRL 0.3 do (core_algos.py, ppo_utils.py): beyond that a token has no gradient any more.
"""

from __future__ import annotations

import torch

from runner.algorithms.estimators import MAX_LOG_RATIO, Rows, TokenLoss, estimator_of, inside
from runner.config.choices import KlEstimator
from runner.config.schema import AlgorithmConfig

MAX_K3 = 10.0


def policy_loss(
    algorithm: AlgorithmConfig,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sample_ids: torch.Tensor,
    num_samples: int,
) -> TokenLoss:
    """The loss per token of the configured estimator, 0 outside the mask; all rows [N] fp32, `mask` bool, `sample_ids` int64
    in [0, S)."""
    logprobs, old_logprobs, advantages = (inside(mask, row) for row in (logprobs, old_logprobs, advantages))
    rows = Rows(logprobs, old_logprobs, advantages, mask, sample_ids, num_samples)
    return estimator_of(algorithm.estimator).loss(algorithm, rows)


def kl_estimate(estimator: KlEstimator, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate [N] of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL divergence").

    With d = ref_logp - logp:  k1 = -d (unbiased, signed),  k2 = d^2 / 2 (biased, low variance; its gradient is the right
    one for on-policy samples),  k3 = exp(d) - 1 - d (unbiased, never negative; GRPO's choice, arXiv 2402.03300, equation 4),
    with |d| at most 20 and k3 at most 10.
    """
    difference = ref_logprobs - logprobs
    if estimator == KlEstimator.k1:
        return -difference
    if estimator == KlEstimator.k2:
        return 0.5 * difference.square()
    difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(difference) - difference).clamp(max=MAX_K3)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy [N] in nats of the distribution given by logits [N, V] fp32: logsumexp(x) - sum softmax(x) x."""
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    probabilities = torch.exp(logits - normalizer)
    return normalizer.squeeze(-1) - (probabilities * logits).sum(-1)
