"""Sampling with random streams that belong to a sample and not to its batch.

The uniform number for one purpose at one position is a hash of (request seed, position, purpose): splitmix64 (Steele et
al. 2014) over a Weyl sequence, in the manner of counter-based generators (Salmon et al. 2011). Tokens are drawn by
inverse CDF in fp64.

Shape legend: M rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SAMPLE, DRAFT, ACCEPT, RESIDUAL = 0, 1, 2, 3  # purposes of a draw
_ROW_LIMIT = 1 << 24  # values of an fp64 CDF that exist at one time


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """fp64 in (0, 1), one per (seed, position): 52 bits, never 0 or 1. seeds and positions int64 [M]."""
    with np.errstate(over="ignore"):
        counter = positions.astype(np.uint64) * np.uint64(4) + np.uint64(purpose + 1)
        state = _mix(seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        mixed = _mix(state ^ _mix(counter * np.uint64(0x9E3779B97F4A7C15)))
    return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def draw(weights: torch.Tensor, uniform: np.ndarray) -> torch.Tensor:
    """Token [M] from unnormalized probabilities [M, V] by inverse CDF; a token of weight 0 is never drawn."""
    picks = []
    chunk = max(1, _ROW_LIMIT // weights.shape[-1])
    points = torch.from_numpy(uniform).to(weights.device)
    for part, point in zip(weights.split(chunk), points.split(chunk), strict=True):
        cdf = part.double().cumsum_(-1)
        target = point.unsqueeze(-1) * cdf[:, -1:]
        picks.append(torch.searchsorted(cdf, target, right=True).squeeze(-1))
    picked = picks[0] if len(picks) == 1 else torch.cat(picks)
    return picked.clamp_(max=weights.shape[-1] - 1)


@dataclass
class Distribution:
    """What a batch of logits says. Rows with temperature 0 are greedy: all of the mass on the largest logit.

    raw        [M, V] fp32 logprobs at temperature 1
    tempered   [M, V] fp32 logprobs at the sampling temperature (raw where it is 0): what is reported
    weights    [M, V] fp32 probabilities that are drawn from (after top-k and top-p)
    """

    raw: torch.Tensor
    tempered: torch.Tensor
    weights: torch.Tensor


@dataclass
class Draws:
    """One token per row: picked int64 [M], and its logprobs fp32 [M] at the sampling temperature and at 1."""

    picked: np.ndarray
    tempered: np.ndarray
    raw: np.ndarray


def draws_of(dist: Distribution, uniform: np.ndarray) -> Draws:
    """A token of each row, by its own uniform number [M]."""
    picked = draw(dist.weights, uniform)

    def of(logprobs: torch.Tensor) -> np.ndarray:
        return logprobs.gather(-1, picked.unsqueeze(-1)).squeeze(-1).cpu().numpy()

    tempered = of(dist.tempered)
    return Draws(picked.cpu().numpy(), tempered, tempered if dist.tempered is dist.raw else of(dist.raw))


def distribution(logits: torch.Tensor, temperature: np.ndarray, top_p: np.ndarray, top_k: np.ndarray) -> Distribution:
    """logits fp32 [M, V]; temperature, top_p fp64 [M], top_k int64 [M] (-1: all)."""
    raw = logits.log_softmax(-1)
    tempered = raw
    if (temperature != 1.0).any():
        safe = torch.from_numpy(np.where(temperature == 0, 1.0, temperature)).to(logits.device, torch.float32)
        tempered = (logits / safe.unsqueeze(-1)).log_softmax(-1)
    weights = tempered.exp()
    if (top_k > 0).any() or (top_p < 1.0).any():
        weights = _filtered(weights, top_p, top_k)
    if (temperature == 0).any():
        greedy = torch.from_numpy(temperature == 0).to(logits.device)
        best = torch.zeros_like(weights).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        weights = torch.where(greedy.unsqueeze(-1), best, weights)
    return Distribution(raw, tempered, weights)


def _filtered(weights: torch.Tensor, top_p: np.ndarray, top_k: np.ndarray) -> torch.Tensor:
    """Zero all but the top k, then all but the smallest set of tokens whose mass reaches top_p (evaluation only)."""
    ordered, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    limit = torch.from_numpy(np.where(top_k > 0, top_k, weights.shape[-1])).to(weights.device)
    ordered = torch.where(rank < limit.unsqueeze(-1), ordered, 0.0)
    share = ordered / ordered.sum(-1, keepdim=True)
    before = share.cumsum(-1) - share
    bound = torch.from_numpy(top_p).to(weights.device, weights.dtype).unsqueeze(-1)
    ordered = torch.where(before < bound, ordered, 0.0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered)
