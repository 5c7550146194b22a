"""Packed micro-batches: samples laid end to end, without padding between them. shares.py says which samples.

Shape legend: T tokens of a micro-batch, T' those of one context-parallel rank, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from runner.trainer.megatron.shares import Geometry
from runner.trainer.megatron.specs import PackedLayout, local_rows
from runner.trainer.microbatch import MicroBatch


@dataclass(frozen=True)
class Packed:
    """A micro-batch as one rank computes it.

    micro            tokens [1, T] of the whole micro-batch; positions [N] into T
    starts           where each sample begins in T
    rows             [T'] positions of this context-parallel rank's tokens
    local_positions  rows of this rank's hidden states that predict response tokens
    local_targets    the tokens they predict
    local_order      which of the N response tokens those are
    sequences        cu_seqlens and attention layout
    """

    micro: MicroBatch
    starts: list[int]
    rows: torch.Tensor
    local_positions: torch.Tensor
    local_targets: torch.Tensor
    local_order: torch.Tensor
    sequences: PackedSeqParams


def pack(sequences: Sequence[tuple[torch.Tensor, int]], indices: list[int], geometry: Geometry, device: torch.device) -> Packed:
    """Samples `indices` of (tokens [T], prompt length P) as this rank's packed micro-batch. An empty list gives padding only."""
    chosen = [sequences[i] for i in indices]
    if any(prompt < 1 for _, prompt in chosen):
        raise ValueError("a sequence needs at least one prompt token: nothing predicts the first one")
    lengths = [geometry.padded(len(tokens)) for tokens, _ in chosen]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rest = -sum(lengths) % geometry.total_multiple
    if rest or not lengths:
        lengths.append(rest or geometry.total_multiple)  # padding is a sequence of its own
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    positions, targets, sample_ids = [], [], []
    for place, ((row, prompt), start) in enumerate(zip(chosen, starts, strict=True)):
        tokens[start : start + len(row)] = row.cpu()
        positions.append(torch.arange(start + prompt - 1, start + len(row) - 1))
        targets.append(row[prompt:].cpu())
        sample_ids.append(torch.full((len(row) - prompt,), place))
    micro = MicroBatch(
        indices=indices,
        tokens=tokens.unsqueeze(0).to(device),
        positions=_cat(positions).to(device),
        targets=_cat(targets).to(device),
        sample_ids=_cat(sample_ids).to(device),
        lengths=[len(row) - prompt for row, prompt in chosen],
    )
    rank = parallel_state.get_context_parallel_rank()
    rows = local_rows(lengths, rank, geometry.cp)
    place_of = torch.full((sum(lengths),), -1)
    place_of[rows] = torch.arange(len(rows))
    local = place_of[micro.positions.cpu()]
    order = (local >= 0).nonzero().squeeze(1)
    return Packed(
        micro=micro,
        starts=starts,
        rows=rows.to(device),
        local_positions=local[order].to(device),
        local_targets=micro.targets[order.to(device)],
        local_order=order.to(device),
        sequences=_sequences(lengths, rank, geometry.cp, device),
    )


def _cat(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows).to(torch.int64) if rows else torch.zeros(0, dtype=torch.int64)


def _sequences(lengths: list[int], cp_rank: int, cp_size: int, device: torch.device) -> PackedSeqParams:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    if device.type == "cpu":
        params.layout = PackedLayout(lengths, cp_rank, cp_size)
    return params
