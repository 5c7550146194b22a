"""Corrections of the train-rollout mismatch by importance weights between trainer and engine. Pure functions.

The engine samples from its own distribution mu (rollout_logprobs), the trainer differentiates pi_old (its own logprobs
of the same weights). The ratio w = pi_old / mu corrects the expectation; each method bounds it in its own way.

    tis      w_t = min(pi_old(t) / mu(t), high): truncated importance sampling per token (Ionides 2008; Yao et al. 2025,
             "Your efficient RL framework secretly brings you off-policy RL training")
    mis      a sequence counts fully weighted, or not at all: w = prod pi_old / mu over its tokens if low <= w <= high, else 0
             (masked importance sampling, Liu and Li et al. 2025, "When speed kills stability", sequence level; one-sided with
             low = 0, two-sided as slime and verl reject with low above it)
    icepop   w_t = pi_old(t) / mu(t) if low <= w_t <= high, else 0 (IcePop: Ling team 2025, arXiv 2510.18855)

Weights are constants: no gradient flows through them. The bounds of each are in conf/shared/corrections.yaml. What is rejected
still counts in the loss's normalizer, as in IcePop; the rejection sampling of slime and verl leaves it out there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.algorithms.estimators import MAX_LOG_RATIO, inside
from runner.config.schema import AlgorithmConfig, Correction


@dataclass(frozen=True)
class Weights:
    """`weights` [N] fp32 to multiply the token losses with; `changed` [N] bool: truncated or masked out."""

    weights: torch.Tensor
    changed: torch.Tensor


def correction_weights(
    algorithm: AlgorithmConfig,
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    mask: torch.Tensor,
    sample_ids: torch.Tensor,
    num_samples: int,
) -> Weights:
    """Importance weights of a flat row of tokens [N] fp32; `mask` [N] bool, `sample_ids` [N] int64 in [0, num_samples).

    What the mask leaves out has the ratio 1, whatever its logprobs are.
    """
    low, high = algorithm.correction_low, algorithm.correction_high
    log_ratio = inside(mask, (old_logprobs - rollout_logprobs).detach())
    if algorithm.correction is Correction.none:
        return Weights(torch.ones_like(log_ratio), torch.zeros_like(mask))
    if algorithm.correction is Correction.tis:
        return tis(log_ratio, high)
    if algorithm.correction is Correction.icepop:
        return icepop(log_ratio, low, high)
    return mis(log_ratio, mask, sample_ids, num_samples, high, low)


def tis(log_ratio: torch.Tensor, high: float) -> Weights:
    """min(exp(log_ratio), high) per token."""
    ratio = _exp(log_ratio)
    return Weights(ratio.clamp(max=high), ratio > high)


def icepop(log_ratio: torch.Tensor, low: float, high: float) -> Weights:
    """exp(log_ratio) where it lies in [low, high], else 0, per token."""
    return _masked(_exp(log_ratio), low, high)


def mis(
    log_ratio: torch.Tensor, mask: torch.Tensor, sample_ids: torch.Tensor, num_samples: int, high: float, low: float = 0.0
) -> Weights:
    """exp of the summed log_ratio of a token's sequence where that lies in [low, high], else 0, for all of its tokens."""
    total = torch.zeros(num_samples, device=log_ratio.device).index_add_(0, sample_ids, inside(mask, log_ratio))
    sequences = _masked(_exp(total), low, high)
    return Weights(sequences.weights[sample_ids], sequences.changed[sample_ids])


def _masked(ratio: torch.Tensor, low: float, high: float) -> Weights:
    outside = (ratio < low) | (ratio > high)
    return Weights(ratio.masked_fill(outside, 0.0), outside)


def _exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
