"""Cutting a batch into padded micro-batches, and logprobs of response tokens from hidden states.

Shape legend: B samples of a micro-batch, W its width (longest sample), N its response tokens laid end to end in sample
order, V vocabulary.

Samples are sorted by length and right-padded. With causal attention a real token never sees the padding after it, so
no attention mask is needed, and fused causal kernels apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from runner.algorithms import losses


@dataclass(frozen=True)
class MicroBatch:
    """
    indices     positions of its samples in the batch it was cut from
    tokens      [B, W] int64, right-padded with 0
    positions   [N] index into [B * W] of the token whose output predicts each response token
    targets     [N] the response tokens
    sample_ids  [N] which of the B samples each belongs to
    lengths     R of each sample
    """

    indices: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    sample_ids: torch.Tensor
    lengths: list[int]

    def gather(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows [R] of the whole batch -> [N] of this micro-batch, on its device."""
        return torch.cat([rows[i] for i in self.indices]).to(self.tokens.device)


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of samples, longest first, in groups whose padded size B * W is at most `max_tokens`.

    A sample longer than `max_tokens` is a group of its own. Ties keep the given order, so the cut is deterministic.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def build(sequences: Sequence[tuple[torch.Tensor, int]], indices: list[int], device: torch.device | str) -> MicroBatch:
    """A micro-batch of (tokens [T], prompt length P) sequences; P is at least 1, since nothing predicts the first token."""
    chosen = [sequences[i] for i in indices]
    if any(prompt < 1 for _, prompt in chosen):
        raise ValueError("a sequence needs at least one prompt token: nothing predicts the first one")
    tokens = torch.nn.utils.rnn.pad_sequence([row.cpu() for row, _ in chosen], batch_first=True).to(torch.int64)
    starts = torch.tensor([prompt - 1 for _, prompt in chosen]).unsqueeze(1)
    ends = torch.tensor([len(row) - 1 for row, _ in chosen]).unsqueeze(1)
    place = torch.arange(tokens.shape[1]).unsqueeze(0)
    sample_ids, columns = ((place >= starts) & (place < ends)).nonzero(as_tuple=True)
    return MicroBatch(
        indices=indices,
        tokens=tokens.to(device),
        positions=(sample_ids * tokens.shape[1] + columns).to(device),
        targets=tokens[sample_ids, columns + 1].to(device),
        sample_ids=sample_ids.to(device),
        lengths=[len(row) - prompt for row, prompt in chosen],
    )


@dataclass(frozen=True)
class TokenScores:
    """`logprobs` [N] fp32 of the targets, `entropy` [N] fp32 in nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor


def whole_vocabulary(logits: torch.Tensor, targets: torch.Tensor, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprobs [N] of the targets, entropies [N]) of fp32 logits [N, V]."""
    logprobs = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=-1)
    if entropy_grad:
        return logprobs, losses.entropy(logits)
    with torch.no_grad():
        return logprobs, losses.entropy(logits)


def score_tokens(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    temperature: float,
    chunk: int,
    entropy_grad: bool,
    softmax: Callable[[torch.Tensor, torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]] = whole_vocabulary,
    fused: bool = False,
) -> TokenScores:
    """Logprobs and entropies of hidden states [N, H] through the output layer, `chunk` rows of [chunk, V] fp32 at a time.

    With several chunks each is recomputed in the backward, so no more than one chunk of logits ever exists. `softmax`
    turns logits into scores; where the vocabulary is divided over ranks it also communicates. `fused`: by Triton kernels in its
    place, on a GPU.
    """

    def part(rows: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(rows)
        if fused:
            from runner.trainer.fused_scores import FusedScores

            scores: tuple[torch.Tensor, torch.Tensor] = FusedScores.apply(logits, wanted, temperature, entropy_grad)
            return scores
        logits = logits.float()
        if temperature != 1.0:
            logits = logits / temperature
        return softmax(logits, wanted, entropy_grad)

    if len(targets) <= chunk:
        return TokenScores(*part(hidden, targets))
    pieces = [
        checkpoint(part, rows, wanted, use_reentrant=False) if torch.is_grad_enabled() else part(rows, wanted)
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return TokenScores(torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]))
