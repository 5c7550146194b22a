"""Experts of the engine, in the place of transformers' fused module: same call, packed weights, few operations.

Shape legend: N tokens, K experts per token, E experts, H hidden, I expert ffn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from runner.rollout.local.weights import ResidentWeight

STACKED_WASTE = 4  # rows of a batched matmul per row that is needed, at most: calls cost more than rows there


class EngineExperts(nn.Module):
    """Tokens sorted by expert, one matmul pair per expert in use. `chosen` is the last call's routes [N, K]."""

    def __init__(
        self,
        gate_up: list[ResidentWeight],
        down: list[ResidentWeight],
        activation: nn.Module,
        stacked: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        """`stacked`: the memory [E, 2 I, H] and [E, H, I] that dense weights are views of."""
        super().__init__()
        self.gate_up, self.down, self.activation, self.stacked = gate_up, down, activation, stacked
        self.chosen: torch.Tensor | None = None

    def forward(self, hidden_NH: torch.Tensor, index_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
        self.chosen = index_NK
        tokens, k = index_NK.shape
        flat = index_NK.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.down)).tolist()
        used = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in used]
        rows = hidden_NH.index_select(0, order // k)
        both = [self.gate_up[expert].linear(part) for expert, part in zip(used, rows.split(sizes), strict=True)]
        gate, up = torch.cat(both).chunk(2, dim=-1)
        inner = self.activation(gate) * up
        outputs = [self.down[expert].linear(part) for expert, part in zip(used, inner.split(sizes), strict=True)]
        unsorted = torch.empty(tokens * k, hidden_NH.shape[-1], dtype=hidden_NH.dtype, device=hidden_NH.device)
        unsorted.index_copy_(0, order, torch.cat(outputs))
        weighted = unsorted.view(tokens, k, -1) * weights_NK.unsqueeze(-1)
        return weighted.sum(1).to(hidden_NH.dtype)

    def layout(self, counts: np.ndarray, block: int) -> tuple[list[int], np.ndarray]:
        """(rows that each expert gets, its first row [E]) for counts [E] pairs.

        Stacked weights get equally many rows each, a multiple of `block`, unless routing is so uneven that it would waste
        more than it saves; with packed weights rows are what costs, so that each gets just its own.
        """
        if self.stacked[0] is not None:
            most = -(-int(counts.max()) // block) * block
            if most * len(counts) <= STACKED_WASTE * max(int(counts.sum()), block * len(counts)):
                return [most] * len(counts), np.arange(len(counts)) * most
        return counts.tolist(), np.cumsum(counts) - counts


def products(
    weights: list[ResidentWeight], stacked: torch.Tensor | None, rows: torch.Tensor, sizes: list[int], out: torch.Tensor
) -> None:
    """rows [S, in] in expert order, sizes [E] rows per expert -> out [S, out]; one batched matmul when sizes are equal."""
    if stacked is not None and sizes.count(sizes[0]) == len(sizes):
        batch, _, columns = len(sizes), *stacked.shape[1:]
        torch.bmm(rows.view(batch, -1, columns), stacked.transpose(1, 2), out=out.view(batch, sizes[0], -1))
        return
    parts = zip(weights, sizes, rows.split(sizes), strict=True)
    torch.cat([weight.linear(part) for weight, size, part in parts if size], out=out)


class EngineLinear(nn.Module):
    """A linear layer over a resident weight of any format; any leading dimensions."""

    def __init__(self, weight: ResidentWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.resident, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.resident.linear(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            output = output + self.bias
        return output.view(*x.shape[:-1], -1)
