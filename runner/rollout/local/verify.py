"""Exact speculative sampling: which proposed tokens are kept, and what is drawn instead of the first refused one.

Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318): a proposal x ~ q is kept with probability
min(1, p(x) / q(x)); the first refused one is replaced by a draw from max(p - q, 0), normalized; when all are kept, one
more token is drawn from p. What comes out has the distribution p.

Shape legend: B rows, k proposals at most per row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from runner.rollout.local.sampling import ACCEPT, RESIDUAL, SAMPLE, draw, uniforms


@dataclass
class Proposal:
    """tokens [B, k] int64; counts [B] (0 .. k); weights [B, k, V] is q, None for proposals without a distribution."""

    tokens: np.ndarray
    counts: np.ndarray
    weights: torch.Tensor | None


def accept_probability(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """min(1, p(x) / q(x)) of the proposed tokens."""
    return (p / q).clamp(max=1.0)


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """max(p - q, 0) [.., V], unnormalized: what is drawn from after a refusal."""
    return (p - q).clamp(min=0.0)


def verify_drawn(drawn: np.ndarray, proposal: Proposal) -> np.ndarray:
    """Tokens that are emitted of each row [B], 1 .. k + 1, for proposals that are certain (q is one point).

    drawn [B, k + 1]: y ~ p after each row's last known token and after each of its proposals, every one with its
    position's own number. A proposal is kept when y equals it: with probability p(x) = min(1, p(x) / 1); a y that differs
    has the law max(p - q, 0) normalized. The tokens are those of plain decoding with the same seed.
    """
    most = proposal.tokens.shape[1]
    kept = (drawn[:, :most] == proposal.tokens) & (np.arange(most) < proposal.counts[:, None])
    return np.cumprod(kept, axis=1).sum(1) + 1


def verify_sampled(
    weights: torch.Tensor, offsets: np.ndarray, proposal: Proposal, seeds: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(emitted tokens [B, k + 1], emitted counts [B], 1 .. k + 1) for proposals drawn from q [B, k, V].

    weights     [N, V] target probabilities p after each row's last known token and after each of its proposals
    offsets     [B] first row of `weights` of each sequence; it has counts + 1 rows
    positions   [B] position of the first token that is emitted; streams are indexed by position
    """
    assert proposal.weights is not None
    rows, most = proposal.tokens.shape
    device = weights.device
    p = weights / weights.sum(-1, keepdim=True)
    proposed = torch.from_numpy(proposal.tokens).to(device)
    columns = np.minimum(np.arange(most), np.maximum(proposal.counts - 1, 0)[:, None])
    at = torch.from_numpy(offsets[:, None] + columns).to(device)
    p_x = p[at, proposed]
    q_x = proposal.weights.gather(-1, proposed.unsqueeze(-1)).squeeze(-1)
    accept = accept_probability(p_x.double(), q_x.double()).cpu().numpy()
    where = positions[:, None] + np.arange(most)
    u = uniforms(np.broadcast_to(seeds[:, None], where.shape), where, ACCEPT)
    kept = (u < accept) & (np.arange(most) < proposal.counts[:, None])
    accepted = np.cumprod(kept, axis=1).sum(1)
    refused = accepted < proposal.counts
    last = p[torch.from_numpy(offsets + accepted).to(device)]
    q_last = proposal.weights[torch.arange(rows, device=device), torch.from_numpy(np.minimum(accepted, most - 1)).to(device)]
    replacement = residual(last, q_last)
    # p == q up to rounding leaves nothing to draw from: a refusal then had probability zero up to the same rounding
    usable = torch.from_numpy(refused).to(device) & (replacement.sum(-1) > 0)
    final = torch.where(usable.unsqueeze(-1), replacement, last)
    stream = np.where(refused, RESIDUAL, SAMPLE)
    at_position = positions + accepted
    number = np.where(stream == RESIDUAL, uniforms(seeds, at_position, RESIDUAL), uniforms(seeds, at_position, SAMPLE))
    token = draw(final, number).cpu().numpy()
    emitted = np.full((rows, most + 1), -1, dtype=np.int64)
    emitted[:, :most] = proposal.tokens
    emitted[np.arange(rows), accepted] = token
    return emitted, accepted + 1
