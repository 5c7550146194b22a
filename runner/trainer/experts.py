"""The trainer's experts function: tokens sorted by expert, one grouped matmul per projection, no atomics.

Shape legend: N tokens, K experts per token, S = N * K (token, expert) pairs, H hidden, F expert ffn, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "runner_sorted"
FP8_ATTRIBUTE = "fp8_matmuls"  # in the instance dict of an experts module whose matmuls take FP8 inputs


class _GatherSorted(torch.autograd.Function):
    """hidden [N, H] -> the rows of its (token, expert) pairs in expert order [S, H].

    The backward gathers with the inverse permutation and sums over K: no scatter into repeated rows, which is slow on a
    CPU and not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return hidden.index_select(0, torch.div(order, top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad.view(-1, ctx.top_k, grad.shape[-1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    """rows [S, H] in expert order -> pair order; the backward is the opposite gather."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


def sorted_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[N, H], [N, K] expert ids, [N, K] weights -> [N, H]; weights `gate_up_proj` [E, 2F, H], `down_proj` [E, H, F].

    `self` is a transformers experts module; under precision=fp8 the inputs of both matmuls are FP8.
    """
    num_tokens, top_k = top_k_index.shape
    fp8 = self.__dict__.get(FP8_ATTRIBUTE)
    pairs = top_k_index.reshape(-1)
    order = torch.argsort(pairs, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    ends = torch.bincount(pairs, minlength=self.num_experts).cumsum(0).to(torch.int32)
    rows = _GatherSorted.apply(hidden_states, order, inverse, top_k)
    gate_up = _matmul(rows, self.gate_up_proj, ends, fp8)
    gate, up = gate_up.chunk(2, dim=-1)
    down = _matmul(self.act_fn(gate) * up, self.down_proj, ends, fp8)
    output = _Unsort.apply(down, order, inverse).view(num_tokens, top_k, -1)
    return (output * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _matmul(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, fp8: Any) -> torch.Tensor:
    if fp8 is not None:
        rows = fp8.before(rows)
    out = torch.nn.functional.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return out if fp8 is None else fp8.after(out)


def register() -> str:
    """Make the function known to transformers; returns its name for `experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    return NAME
