"""Logprobs and entropies straight from a layer's logits on a GPU, in Triton: read once forward and once backward, no fp32 copy.

In eager torch a chunk of fp32 logits is made, divided, exponentiated, multiplied and summed, each a pass over memory, and again
backward. Here a program takes a row: forward it keeps a running maximum, sum of exponentials and sum of exponential times logit
(online softmax, Milakov and Gimelshein, arXiv 1805.02867); backward it writes the gradient in the logits' own dtype. Sums run in
another order than torch's, so CPU runs keep the eager way and their bits. Not timed yet.

Shape legend: N rows (tokens), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096  # columns at a time


@triton.jit
def _forward_kernel(
    logits, targets, logprobs, entropies, normalizers, columns, stride, inverse_temperature, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * stride
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < columns
        x = tl.load(first + place, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(x, axis=0))
        shrink = tl.exp(top - higher)
        e = tl.exp(x - higher)
        total = total * shrink + tl.sum(e, axis=0)
        weighted = weighted * shrink + tl.sum(e * tl.where(inside, x, 0.0), axis=0)
        top = higher
    normalizer = top + tl.log(total)
    chosen = tl.load(first + tl.load(targets + row)).to(tl.float32) * inverse_temperature
    tl.store(logprobs + row, chosen - normalizer)
    tl.store(entropies + row, normalizer - weighted / total)
    tl.store(normalizers + row, normalizer)


@triton.jit
def _backward_kernel(
    logits, targets, normalizers, entropies, grad_logprobs, grad_entropies, grad, columns, stride, inverse_temperature,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = row.to(tl.int64) * stride
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < columns
    x = tl.load(logits + first + place, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
    log_probability = x - tl.load(normalizers + row)
    probability = tl.exp(log_probability)
    hit = place == tl.load(targets + row)
    slope = tl.load(grad_logprobs + row) * (tl.where(hit, 1.0, 0.0) - probability)
    if ENTROPY:
        slope -= tl.load(grad_entropies + row) * probability * (log_probability + tl.load(entropies + row))
    tl.store(grad + row.to(tl.int64) * columns + place, (slope * inverse_temperature).to(grad.dtype.element_ty), mask=inside)


class FusedScores(torch.autograd.Function):
    """(logits [N, V] of any float dtype, targets [N], temperature, entropy_grad) -> (logprobs [N], entropies [N]) fp32."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = logits.shape
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        logprobs, entropies, normalizers = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        if rows:
            _forward_kernel[(rows,)](
                logits, targets, logprobs, entropies, normalizers, columns, logits.stride(0), 1.0 / temperature, BLOCK=BLOCK
            )
        ctx.save_for_backward(logits, targets, normalizers, entropies)
        ctx.temperature, ctx.entropy_grad = temperature, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, targets, normalizers, entropies = ctx.saved_tensors
        rows, columns = logits.shape
        grad = torch.empty((rows, columns), dtype=logits.dtype, device=logits.device)
        if rows:
            _backward_kernel[(rows, triton.cdiv(columns, BLOCK))](
                logits, targets, normalizers, entropies, grads[0].contiguous(), grads[1].contiguous(), grad, columns,
                logits.stride(0), 1.0 / ctx.temperature, ENTROPY=ctx.entropy_grad, BLOCK=BLOCK,
            )  # fmt: skip
        return grad, None, None, None
