"""The FP8 Triton kernels against the reference: through Triton's interpreter on a CPU, for real wherever there is a GPU."""

from __future__ import annotations

import pytest
import torch

from runner.precision import fp8
from runner.precision.checks import WeightError
from tests.interpreter import DEVICE, interpret, needs_triton, runs_here, starts_it

KINDS = ["normal", "wide", "any_bits", "middles", "zeros", "infinite"]


@needs_triton
@starts_it
def test_the_tests_below_pass_in_the_interpreter() -> None:
    interpret(__file__)


def values_of(kind: str, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "wide":  # from e4m3's subnormal numbers to its largest in one group
        x = x * torch.logspace(-8, 2, columns)
    if kind == "any_bits":
        wide = dtype is torch.float32
        bits = torch.randint(0, 0x7F000000 if wide else 0x7F00, (rows, columns), generator=generator, dtype=torch.int32)
        x = bits.view(torch.float32) if wide else bits.to(torch.uint16).view(torch.bfloat16).float()
        x = x * (1 - 2 * torch.randint(0, 2, (rows, columns), generator=generator))
    if kind == "middles":  # between two e4m3 numbers, under amax = 448, 449 and so on: quotients near the middle or on it
        codes = torch.randint(0, 0x7E, (rows, columns), generator=generator, dtype=torch.uint8)
        low, high = codes.view(torch.float8_e4m3fn).float(), (codes + 1).view(torch.float8_e4m3fn).float()
        x = (low + high) / 2
        x[:, ::128] = 448.0 + torch.arange(rows)[:, None]
    if kind == "zeros":
        x[::2] = 0.0
        x[1::2, ::2] = -0.0
    if kind == "infinite":
        x[0, 3], x[min(1, rows - 1), 5] = float("inf"), float("nan")
    return x.to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bits, but any NaN equals any."""
    found, wanted = found.cpu(), wanted.cpu()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    nan = found.float().isnan()
    return torch.equal(nan, wanted.float().isnan()) and torch.equal(found.view(bits)[~nan], wanted.view(bits)[~nan])


@needs_triton
@runs_here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 384), (33, 200), (1, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernel_bits_of_activations(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    from runner.precision.kernels import gpu_fp8

    x = values_of(kind, *shape, dtype)
    q, scale = fp8.quantize_activations(x)
    found_q, found_scale = gpu_fp8.quantize_activations(x.to(DEVICE))
    assert same(found_scale, scale) and same(found_q, q)
    effective = gpu_fp8.quantize_dequantize_activations(x.to(DEVICE)[None])
    assert effective.dtype is dtype and same(effective[0], fp8.dequantize_activations(q, scale, dtype=dtype))


@needs_triton
@runs_here
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "infinite"])
@pytest.mark.parametrize("shape", [(2, 130, 200), (256, 128), (7, 300)], ids=str)
def test_kernel_bits_of_weights_in_place(kind: str, shape: tuple[int, ...]) -> None:
    from runner.precision.kernels import gpu_fp8

    weight = values_of(kind, shape[-2], shape[-1], torch.bfloat16).expand(shape).contiguous()
    wanted, scale = fp8.quantize_dequantize(weight)
    stack = torch.full((*shape[:-2], shape[-2] + 8, shape[-1]), 5.0, dtype=torch.bfloat16, device=DEVICE)
    view = stack[..., 8:, :]  # rows of a stack
    view.copy_(weight)
    assert gpu_fp8.suits_weight(view)
    found = gpu_fp8.quantize_dequantize_(view, None)
    assert same(found, scale) and same(view, wanted) and bool((stack[..., :8, :] == 5).all())
    values, kept = fp8.quantize(wanted, scale=scale)
    assert torch.equal(fp8.regrid(wanted, scale)[0].view(torch.uint8), values.view(torch.uint8))
    again = view.clone()
    assert gpu_fp8.quantize_dequantize_(again, kept.to(DEVICE)) is not None and same(again, view)


@needs_triton
@runs_here
def test_kernel_tells_of_bad_weights_and_leaves_their_block_as_it_was() -> None:
    from runner.precision.kernels import BadWeights, gpu, gpu_fp8

    weight = values_of("normal", 256, 256, torch.bfloat16)
    weight[200, 3] = float("nan")
    given = weight.to(DEVICE, copy=True)
    with pytest.raises(WeightError, match="NaN values in 1 of 4 groups"):
        gpu_fp8.quantize_dequantize_(given, None)
    assert same(given[128:, :128], weight[128:, :128])
    with pytest.raises(BadWeights, match="1 of 2"), gpu.checked_together():
        gpu_fp8.quantize_dequantize_(weight.to(DEVICE, copy=True), None)
        gpu_fp8.quantize_dequantize_(values_of("normal", 128, 128, torch.bfloat16).to(DEVICE), None)
