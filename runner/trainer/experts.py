"""The trainer's experts function: tokens sorted by expert, one grouped matmul per projection, no atomics.

Shape legend: N tokens, K experts per token, S = N * K (token, expert) pairs, P >= S padded rows, H hidden, F expert ffn,
E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from runner.routing.routes import rows_per_expert

NAME = "runner_sorted"
# oneDNN compiles a bf16 matmul for every new number of rows (milliseconds each), and routing gives new numbers in every
# step: rounded up, they repeat.
CPU_ROWS = 64
FP8_ATTRIBUTE = "fp8_matmuls"  # in the instance dict of an experts module whose matmuls take FP8 inputs


class _ToSlots(torch.autograd.Function):
    """hidden [N, H] -> [P, H]: row slot[n * K + k] is token n's for its k-th expert, other rows are zero.

    The backward gathers and sums over K: no scatter into repeated rows, which is slow on a CPU and not deterministic on
    a GPU.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, slot: torch.Tensor, top_k: int, total: int) -> torch.Tensor:
        ctx.save_for_backward(slot)
        ctx.top_k = top_k
        return hidden.new_zeros(total, hidden.shape[1]).index_copy_(0, slot, hidden.repeat_interleave(top_k, dim=0))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        grad = grads[0].index_select(0, slot)
        return grad.view(-1, ctx.top_k, grad.shape[-1]).sum(1), None, None, None


class _FromSlots(torch.autograd.Function):
    """rows [P, H] -> [S, H] in pair order; the backward puts the gradient back, zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot)
        ctx.total = len(rows)
        return rows.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slot,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.total, grad.shape[1]).index_copy_(0, slot, grad), None


class _BiasOfRows(torch.autograd.Function):
    """bias [E, out], rows per expert [E] -> [P, out] of rows in expert order; the backward sums each expert's rows in fp32."""

    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, counts: torch.Tensor, total: int) -> torch.Tensor:
        ctx.save_for_backward(counts)
        return bias.repeat_interleave(counts, dim=0, output_size=total)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (counts,) = ctx.saved_tensors
        sums = torch.segment_reduce(grads[0].float(), "sum", lengths=counts, axis=0)
        return sums.to(grads[0].dtype), None, None


def sorted_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[N, H], [N, K] expert ids, [N, K] weights -> [N, H]; weights `gate_up_proj` [E, 2F, H], `down_proj` [E, H, F], and biases
    [E, out] beside them where the module has any.

    `self` is an experts module of transformers' kind; under precision=fp8 both matmuls are those of fp8.py.
    """
    num_tokens, top_k = top_k_index.shape
    slot, ends, total = _slots(top_k_index.reshape(-1), self.num_experts, CPU_ROWS if hidden_states.device.type == "cpu" else 1)
    rows = _ToSlots.apply(hidden_states, slot, top_k, total)
    inner = self._apply_gate(_linear(self, "gate_up_proj", rows, ends))
    down = _linear(self, "down_proj", inner, ends)
    output = _FromSlots.apply(down, slot).view(num_tokens, top_k, -1)
    return (output * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _slots(pairs: torch.Tensor, num_experts: int, multiple: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Expert of each pair [S] -> (row of each pair, end row of each expert int32 [E], rows in all).

    Rows lie in expert order, each expert's padded to a `multiple`; 1 pads nothing and needs no synchronization.
    """
    order = torch.argsort(pairs, stable=True)
    counts = rows_per_expert(pairs, num_experts)
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # what padding of earlier experts adds to a sorted position
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=order.device)
    slot = slot + shift[pairs]
    return slot, ends.to(torch.int32), len(pairs) if multiple == 1 else int(ends[-1])


def _linear(module: Any, attribute: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`_matmul`, and the bias of each row's expert."""
    output = _matmul(module, attribute, rows, ends)
    if not module.has_bias:
        return output
    counts = torch.diff(ends.long(), prepend=ends.new_zeros(1, dtype=torch.long))
    return output + _BiasOfRows.apply(getattr(module, f"{attribute}_bias"), counts, len(rows))


def _matmul(module: Any, attribute: str, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows [P, in] times the module's stack `attribute` [E, out, in] -> [P, out]."""
    weight, fp8 = getattr(module, attribute), module.__dict__.get(FP8_ATTRIBUTE)
    if fp8 is not None:
        return fp8.grouped(attribute, rows, weight, ends)
    return torch.nn.functional.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)


def register() -> str:
    """Make the function known to transformers; returns its name for `experts_implementation`."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, sorted_experts_forward)
    return NAME
