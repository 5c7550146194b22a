"""Experts of the engine, in the place of transformers' fused module: same call, packed weights, few operations.

Shape legend: N tokens, K experts per token, E experts, H hidden, I expert ffn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from runner.rollout.local.weights import ResidentWeight


class EngineExperts(nn.Module):
    """Tokens sorted by expert, one matmul pair per expert in use. `chosen` is the last call's routes [N, K]."""

    def __init__(
        self,
        gate_up: list[ResidentWeight],
        down: list[ResidentWeight],
        apply_gate: Callable[[torch.Tensor], torch.Tensor],
        stacked: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """`apply_gate`: gate and up projection [..., 2 I] -> [..., I]. `stacked`: the memory [E, 2 I, H] and [E, H, I] that dense
        weights are views of. `biases`: [E, 2 I] and [E, H]."""
        super().__init__()
        self.gate_up, self.down, self.apply_gate, self.stacked, self.biases = gate_up, down, apply_gate, stacked, biases
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
        both = torch.cat([self.gate_up[expert].linear(part) for expert, part in zip(used, rows.split(sizes), strict=True)])
        if self.biases is not None:
            both += self.biases[0].index_select(0, flat[order])
        inner = self.apply_gate(both)
        outputs = torch.cat([self.down[expert].linear(part) for expert, part in zip(used, inner.split(sizes), strict=True)])
        if self.biases is not None:
            outputs += self.biases[1].index_select(0, flat[order])
        unsorted = torch.empty(tokens * k, hidden_NH.shape[-1], dtype=hidden_NH.dtype, device=hidden_NH.device)
        unsorted.index_copy_(0, order, outputs)
        weighted = unsorted.view(tokens, k, -1) * weights_NK.unsqueeze(-1)
        return weighted.sum(1).to(hidden_NH.dtype)


def expert_products(weights: list[ResidentWeight], rows: torch.Tensor, sizes: list[int], out: torch.Tensor) -> None:
    """rows [P, in] in expert order, sizes [E] rows per expert -> out [P, out]."""
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
