"""The FP8 kernel for experts against the product of the dequantized operands: through Triton's interpreter on a CPU, for real
wherever there is a GPU that has it."""

from __future__ import annotations

import pytest
import torch

from runner.precision import fp8, fp8_matmul
from tests.interpreter import DEVICE, interpret, needs_triton, runs_here, starts_it

on_hopper = pytest.mark.skipif(
    DEVICE == "cuda" and fp8_matmul.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None,
    reason="no Hopper GPU with CUDA 12.9",
)


@needs_triton
@starts_it
def test_the_tests_below_pass_in_the_interpreter() -> None:
    interpret(__file__)


@needs_triton
@runs_here
@on_hopper
@pytest.mark.parametrize(
    ("sizes", "inputs", "outputs"),
    [((5, 0, 70, 64), 256, 128), ((0, 0, 1), 128, 384), ((129,), 128, 128), ((0, 64, 0, 0, 3), 384, 256)],
    ids=str,
)
def test_kernel_of_experts_gives_the_product_of_the_operands(sizes: tuple[int, ...], inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    x = torch.randn(sum(sizes), inputs, generator=generator) * torch.logspace(-3, 3, sum(sizes))[:, None]
    weights = (torch.randn(len(sizes), outputs, inputs, generator=generator) * torch.logspace(-1, 1, inputs)).bfloat16()
    q, scale = fp8.quantize_activations(x.bfloat16())
    weight_q, weight_scale = fp8.quantize(weights)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    found = fp8_matmul.grouped(*(tensor.to(DEVICE) for tensor in (q, scale, weight_q, weight_scale, ends))).cpu().float()
    left = fp8.dequantize_activations(q, scale, dtype=torch.float32).split(list(sizes))
    right = fp8.dequantize(weight_q, weight_scale, dtype=torch.float32)
    wanted = torch.cat([rows @ weight.t() for rows, weight in zip(left, right, strict=True)])
    size = torch.cat([rows.abs() @ weight.abs().t() for rows, weight in zip(left, right, strict=True)])
    # the sum's own rounding, then bf16's; Hopper's tensor cores keep 14 bits of a sum of 32 products
    error = ((found - wanted).abs() - wanted.abs() * 2**-8) / size
    assert float(error.max()) < (2**-11 if DEVICE == "cuda" else 2**-20)
