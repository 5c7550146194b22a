"""The Triton kernels against the reference: through Triton's interpreter on a CPU, for real wherever there is a GPU."""

from __future__ import annotations

import pytest
import torch

from runner.config.schema import Convention
from runner.precision import int4
from runner.precision.checks import WeightError
from tests.interpreter import DEVICE, interpret, needs_triton, runs_here, starts_it


@needs_triton
@starts_it
def test_the_tests_below_pass_in_the_interpreter() -> None:
    interpret(__file__)


def weight_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    if kind == "stacked":
        return (torch.randn(3, 8, 512, generator=generator) * 0.02).bfloat16()
    if kind == "near_ties":
        return (torch.randint(-32, 33, (16, 512), generator=generator) * 0.5**7).bfloat16()
    if kind == "subnormal":
        tiny = torch.randint(-40, 41, (16, 512), generator=generator).to(torch.float32) * 2.0**-133
        tiny[::3] = 0.0
        return tiny.bfloat16()
    bits = torch.randint(0, 0x7F00, (33, 512), generator=generator, dtype=torch.int32)
    sign = torch.randint(0, 2, (33, 512), generator=generator, dtype=torch.int32) << 15
    return (bits | sign).to(torch.uint16).view(torch.bfloat16)


@needs_triton
@runs_here
@pytest.mark.parametrize("kind", ["stacked", "near_ties", "subnormal", "any_bits"])
@pytest.mark.parametrize("group_size", [16, 128, -1])
@pytest.mark.parametrize("convention", list(Convention))
def test_kernel_bits(kind: str, group_size: int, convention: Convention) -> None:
    from runner.precision.kernels import gpu, limit_of

    weight = weight_of(kind)
    q, scale = int4.quantize(weight, group_size, convention)
    effective, packed = int4.dequantize(q, scale), int4.pack(q)

    limit = limit_of(convention, None)
    got, got_scale = gpu.quantize_pack(weight.to(DEVICE), group_size, convention, None, limit)
    assert torch.equal(got.cpu(), packed)
    assert torch.equal(got_scale.cpu().view(torch.uint16), scale.view(torch.uint16))
    assert torch.equal(gpu.unpack(got).cpu(), q)

    changed = weight.to(DEVICE, copy=True)
    in_place_scale = gpu.quantize_dequantize_(changed, group_size, convention, None, limit)
    assert torch.equal(changed.cpu().view(torch.uint16), effective.view(torch.uint16))
    assert torch.equal(in_place_scale.cpu().view(torch.uint16), scale.view(torch.uint16))

    kept, _ = gpu.quantize_pack(effective.to(DEVICE), group_size, convention, scale.to(DEVICE), limit_of(convention, scale))
    assert torch.equal(kept.cpu(), int4.pack(int4.quantize(effective, group_size, convention, scale)[0]))


@needs_triton
@runs_here
def test_kernel_keeps_scales_far_from_their_weights() -> None:
    """Scales from the smallest to the largest, with weights that they divide, that clamp and that vanish."""
    from runner.precision.kernels import gpu, limit_of

    generator = torch.Generator().manual_seed(4)
    scale = torch.arange(1, 0x7F80, 127, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)[:, None]  # [257, 1]
    bits = torch.randint(0, 0x7F80, (len(scale), 128), generator=generator, dtype=torch.int32).to(torch.uint16)
    near = scale.float() * (torch.randint(-40, 41, (len(scale), 128), generator=generator) / 4)
    for weight in (bits.view(torch.bfloat16), near.clamp(-3e38, 3e38).bfloat16()):
        q, _ = int4.quantize(weight, 128, Convention.llmcompressor, scale)
        limit = limit_of(Convention.llmcompressor, scale)
        packed, _ = gpu.quantize_pack(weight.to(DEVICE), 128, Convention.llmcompressor, scale.to(DEVICE), limit)
        assert torch.equal(gpu.unpack(packed).cpu(), q)


@needs_triton
@runs_here
def test_kernel_tells_of_bad_weights_once_for_all_tensors() -> None:
    from runner.precision import kernels
    from runner.precision.kernels import gpu, limit_of

    limit, good = limit_of(Convention.exact, None), weight_of("stacked").to(DEVICE)
    bad = good.clone()
    bad[2, 1, 5] = float("nan")
    with gpu.checked_together():
        gpu.quantize_dequantize_(good.clone(), 32, Convention.exact, None, limit)
    with pytest.raises(kernels.BadWeights, match="1 of 2 quantized weights"), gpu.checked_together():
        gpu.quantize_dequantize_(bad, 32, Convention.exact, None, limit)
        gpu.quantize_dequantize_(good, 32, Convention.exact, None, limit)
    assert bad.isnan().sum() == 1  # its group is as it came in
    with pytest.raises(WeightError, match="NaN"):
        gpu.quantize_pack(bad, 32, Convention.exact, None, limit)


@needs_triton
@runs_here
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_kernel_refuses_bad_weights(bad: float) -> None:
    from runner.precision.kernels import gpu, limit_of

    weight = weight_of("stacked").to(DEVICE)
    weight[1, 3, 77] = bad
    limit = limit_of(Convention.exact, None)
    for function in (gpu.quantize_pack, gpu.quantize_dequantize_):
        with pytest.raises(WeightError, match="NaN|infinite"):
            function(weight.clone(), 32, Convention.exact, None, limit)
