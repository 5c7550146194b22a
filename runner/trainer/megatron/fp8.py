"""FP8 on CPU ranks, simulated as trainer=torch does it (runner.trainer.torch.fp8); on CUDA Transformer Engine has FP8 matmuls.

Weights hold quantize-dequantized 128 x 128 blocks (qat.py). Here the inputs of their matmuls become 1 x 128 FP8, and with
fp8_backward the gradients of their outputs, before anything is communicated. What a rank holds of a divided dimension is a
multiple of 128 (qat.check_format), so a shard's groups are those of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from runner.trainer.megatron import names
from runner.trainer.megatron.qat import Quantized, QuantizedParameters
from runner.trainer.torch.fp8 import QuantizeActivation, QuantizeGradient


def simulate_fp8(model: nn.Module, quantized: QuantizedParameters, *, backward: bool) -> None:
    """Every linear with an FP8 weight takes FP8 inputs from now on. `backward`: gradients too."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight in quantized:
            module.forward = _forward(module.forward, quantized[weight], backward)


def _forward(inner: Any, weight: Quantized, backward: bool) -> Any:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y, bias = inner(QuantizeActivation.apply(x), *args, **kwargs)
        return (_quantize_gradient(y, weight) if backward else y), bias

    return forward


def _quantize_gradient(y: torch.Tensor, weight: Quantized) -> torch.Tensor:
    """y [..., outputs] whose gradient is quantized by itself for every HF tensor in the weight."""
    entry = weight.place.entry
    if entry.kind is names.Kind.direct:
        return QuantizeGradient.apply(y)
    pieces = [piece.movedim(0, -1) for piece in names.separate(entry, y.movedim(-1, 0), weight.model)]
    return names.join(entry, [QuantizeGradient.apply(piece).movedim(-1, 0) for piece in pieces], weight.model).movedim(0, -1)
