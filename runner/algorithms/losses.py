"""Policy losses, KL estimators and entropy over a flat row of response tokens. Pure functions of tensors.

Shape legend: N response tokens of a micro-batch laid end to end, S samples in it.

Every loss is a value per token; `aggregation.py` says what tokens weigh against each other and what their sum is divided by.

What lies outside the loss mask is replaced by zero before anything is computed with it (`inside`): infinity times zero is not
a number, in a gradient too. Differences of logprobs are clamped to 20 nats before their exponential, and k3 to 10, as verl 0.9
and SkyRL 0.3 do (core_algos.py, ppo_utils.py): beyond that a token has no gradient any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.config.schema import AlgorithmConfig, Estimator

MAX_LOG_RATIO = 20.0  # nats
MAX_LOG_SEQUENCE_RATIO = 10.0  # of GSPO, whose ratios are means over tokens
MAX_K3 = 10.0


@dataclass(frozen=True)
class TokenLoss:
    """`loss` [N]: per-token objective, to be weighted, masked and summed; `clipped` [N] bool: the clip took the gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor


def inside(mask: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`row` [N] with zeros outside the mask: infinities and NaN that stood there are left neither in value nor in gradient."""
    return torch.where(mask, row, 0.0)


def policy_loss(
    algorithm: AlgorithmConfig,
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sample_ids: torch.Tensor,
    num_samples: int,
) -> TokenLoss:
    """The per-token loss of the configured estimator, 0 outside the mask; all rows [N] fp32, `mask` bool, `sample_ids` int64
    in [0, S)."""
    low, high = algorithm.clip_low, algorithm.clip_high
    logprobs, old_logprobs, advantages = (inside(mask, row) for row in (logprobs, old_logprobs, advantages))
    if algorithm.estimator is Estimator.gspo:
        return gspo_loss(logprobs, old_logprobs, advantages, mask, sample_ids, num_samples, low, high)
    if algorithm.estimator is Estimator.cispo:
        return cispo_loss(logprobs, old_logprobs, advantages, low, high)
    return ppo_clip_loss(logprobs, old_logprobs, advantages, low, high, algorithm.dual_clip)


def ppo_clip_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> TokenLoss:
    """Token-level clipped surrogate: max(-A r, -A clip(r, 1 - low, 1 + high)), r = exp(logp - old_logp).

    PPO, arXiv 1707.06347, equation 7; clip-higher (two bounds): DAPO, arXiv 2503.14476, section 3.1. `dual_clip` c above 0
    bounds the loss of a negative advantage by -A c: dual-clip PPO, Ye et al. 2020, arXiv 1912.09729, equation 5.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss, took = torch.maximum(plain, clipped), clipped > plain
    if dual_clip:
        bound = -advantages * dual_clip
        above = (advantages < 0) & (loss > bound)
        loss, took = torch.where(above, bound, loss), took | above
    return TokenLoss(loss, took.detach())


def gspo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    sample_ids: torch.Tensor,
    num_samples: int,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Sequence-level ratio s_i = exp(mean over the sequence's tokens of (logp - old_logp)), clipped per sequence.

    GSPO, arXiv 2507.18071, equations 5-7, in its token form GSPO-token (equations 13-14): s_it = sg[s_i] * exp(logp -
    sg[logp]) has the value of s_i, and with equal advantages within a sequence the gradient of GSPO.
    """
    count = torch.zeros(num_samples, device=logprobs.device).index_add_(0, sample_ids, mask.to(logprobs.dtype)).clamp_min(1.0)
    difference = inside(mask, (logprobs - old_logprobs).detach())
    mean = torch.zeros(num_samples, device=logprobs.device).index_add_(0, sample_ids, difference) / count
    ratio = torch.exp((mean[sample_ids] + (logprobs - logprobs.detach())).clamp(max=MAX_LOG_SEQUENCE_RATIO))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return TokenLoss(torch.maximum(plain, clipped), (clipped > plain).detach())


def cispo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> TokenLoss:
    """REINFORCE weighted by the clipped, detached ratio: -sg[clip(r, 1 - low, 1 + high)] A logp; no token loses its gradient.

    CISPO, arXiv 2506.13585 (MiniMax-M1), equations 4-5. The paper sets no lower bound: clip_low=1.
    """
    ratio = torch.exp((logprobs - old_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return TokenLoss(-weight * advantages * logprobs, weight != ratio)


def kl_estimate(estimator: str, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate [N] of KL(policy || reference) from samples of the policy (Schulman, "Approximating KL divergence").

    With d = ref_logp - logp:  k1 = -d (unbiased, signed),  k2 = d^2 / 2 (biased, low variance; its gradient is the right
    one for on-policy samples),  k3 = exp(d) - 1 - d (unbiased, never negative; GRPO's choice, arXiv 2402.03300, equation 4),
    with |d| at most 20 and k3 at most 10.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return (torch.expm1(difference) - difference).clamp(max=MAX_K3)
    raise ValueError(f"kl_estimator is {estimator!r}; it must be k1, k2 or k3")


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy [N] in nats of the distribution given by logits [N, V] fp32: logsumexp(x) - sum softmax(x) x."""
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    probabilities = torch.exp(logits - normalizer)
    return normalizer.squeeze(-1) - (probabilities * logits).sum(-1)
