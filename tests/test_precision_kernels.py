"""The fast kernels give the bits of the reference: every convention, group size, shape and magnitude."""

from __future__ import annotations

import pytest
import torch

from runner.config.schema import Convention
from runner.precision import int4, kernels
from runner.precision.checks import WeightError


@pytest.fixture(autouse=True)
def always_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FIRST_ELEMENTS", 0)
    monkeypatch.setattr(kernels, "LOADED_ELEMENTS", 0)


def bf16_everywhere(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random finite bf16 bits, so that exponents spread over the whole range; large ones stay below 2^120."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 0x7B00, (rows, columns), generator=generator, dtype=torch.int32)
    sign = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.int32) << 15
    return (bits | sign).to(torch.uint16).view(torch.bfloat16)


def weights(kind: str, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    match kind:
        case "normal":
            return (torch.randn(48, columns, generator=generator) * 0.02).bfloat16()
        case "stacked":
            return (torch.randn(3, 16, columns, generator=generator) * 0.02).bfloat16()
        case "any_bits":
            return bf16_everywhere(64, columns)
        case "near_ties":  # small multiples of one scale: quotients at and next to every half integer
            return (torch.randint(-32, 33, (64, columns), generator=generator) * 0.5**7).bfloat16()
        case "zeros_and_subnormals":
            tiny = torch.randint(-40, 41, (64, columns), generator=generator).to(torch.float32) * 2.0**-133
            tiny[::3] = 0.0
            return tiny.bfloat16()
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["normal", "stacked", "any_bits", "near_ties", "zeros_and_subnormals"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256, -1])
@pytest.mark.parametrize("convention", list(Convention))
def test_bits_equal_the_reference(kind: str, group_size: int, convention: Convention) -> None:
    weight = weights(kind, 768)
    q, scale = int4.quantize(weight, group_size, convention)
    effective = int4.dequantize(q, scale)

    packed, kernel_scale = kernels.quantize_pack(weight, group_size, convention)
    assert torch.equal(packed, int4.pack(q))
    assert torch.equal(kernel_scale.view(torch.uint16), scale.view(torch.uint16))
    assert torch.equal(kernels.unpack(packed, 768), q)

    changed = weight.clone()
    in_place_scale = kernels.quantize_dequantize_(changed, group_size, convention)
    assert torch.equal(changed.view(torch.uint16), effective.view(torch.uint16))
    assert torch.equal(in_place_scale.view(torch.uint16), scale.view(torch.uint16))

    again, kept = kernels.quantize_pack(effective, group_size, convention, scale)
    assert torch.equal(again, int4.pack(int4.quantize(effective, group_size, convention, scale)[0]))
    assert kept.data_ptr() == scale.data_ptr() or torch.equal(kept, scale)


@pytest.mark.parametrize("convention", list(Convention))
def test_every_magnitude_against_every_scale_mantissa(convention: Convention) -> None:
    """All pairs of 8-bit mantissas, quotients from 2^-2 to past 8: no integer differs."""
    mantissas = torch.arange(128, dtype=torch.int32)
    for exponent in (125, 126, 127, 128, 129, 130):
        scale_bits = (127 << 7) | mantissas
        weight_bits = (exponent << 7) | mantissas
        weight = weight_bits.to(torch.uint16).view(torch.bfloat16).repeat(128, 1)
        weight = torch.cat([weight, -weight], -1)
        scale = scale_bits.to(torch.uint16).view(torch.bfloat16).unsqueeze(-1)
        expected, _ = int4.quantize(weight, -1, convention, scale)
        packed, _ = kernels.quantize_pack(weight, -1, convention, scale)
        assert torch.equal(packed, int4.pack(expected))
        changed = weight.clone()
        kernels.quantize_dequantize_(changed, -1, convention, scale)
        assert torch.equal(changed, int4.dequantize(expected, scale))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.precision.kernels.threads.ELEMENTS_PER_THREAD", 64)
    weight = weights("normal", 256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        packed, scale = kernels.quantize_pack(weight, 32, Convention.exact)
    finally:
        torch.set_num_threads(before)
    q, expected = int4.quantize(weight, 32, Convention.exact)
    assert torch.equal(packed, int4.pack(q)) and torch.equal(scale, expected)


@pytest.mark.parametrize("convention", list(Convention))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), "0x7F6F", "0x7F70", "0x7F7E", "0x7F7F"])
def test_bad_weights_raise_where_the_reference_does(bad: float | str, convention: Convention) -> None:
    weight = weights("normal", 256)
    if isinstance(bad, str):
        weight[7, 33] = torch.tensor(int(bad, 16), dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    else:
        weight[7, 33] = bad
    try:
        effective, _ = int4.quantize_dequantize(weight, 32, convention)
    except WeightError as error:
        for function in (kernels.quantize_pack, kernels.quantize_dequantize_):
            with pytest.raises(WeightError) as caught:
                function(weight.clone(), 32, convention)
            assert caught.value.problem.split()[1] == error.problem.split()[1]
    else:
        assert isinstance(bad, str)
        kernels.quantize_dequantize_(weight, 32, convention)
        assert torch.equal(weight, effective)


def test_views_of_a_stack_are_changed_in_place() -> None:
    stack = weights("normal", 256).view(3, 16, 256).clone()
    expected = stack.clone()
    expected[:, 4:12] = int4.quantize_dequantize(stack[:, 4:12], 32, Convention.exact)[0]
    scale = kernels.quantize_dequantize_(stack[:, 4:12], 32, Convention.exact)
    assert torch.equal(stack, expected) and scale.shape == (3, 8, 8)


def test_non_contiguous_and_odd_widths_fall_to_the_reference() -> None:
    wide = (torch.randn(64, 80, generator=torch.Generator().manual_seed(1)) * 0.1).bfloat16()
    for weight in (wide.t(), wide[:, ::2], wide[:, :24]):
        group = 8 if weight.shape[-1] % 16 else 16
        packed, scale = kernels.quantize_pack(weight, group, Convention.kimi)
        q, expected = int4.quantize(weight, group, Convention.kimi)
        assert torch.equal(packed, int4.pack(q)) and torch.equal(scale, expected)
        changed = weight.clone().t().contiguous().t()
        kernels.quantize_dequantize_(changed, group, Convention.kimi)
        assert torch.equal(changed, int4.dequantize(q, expected))


def test_few_weights_never_load_numba_and_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default run must not pay for numba's start; a job with many weights must not stay with eager torch."""
    monkeypatch.setattr(kernels, "FIRST_ELEMENTS", 3 * 48 * 256)
    monkeypatch.setattr(kernels, "_seen", {"elements": 0})
    loads: list[bool] = []
    monkeypatch.setattr(kernels, "_loaded", lambda: bool(loads))
    monkeypatch.setattr(kernels, "load", lambda: loads.append(True))
    weight = weights("normal", 256)
    for already in (0, 0, 1, 1):
        kernels.quantize_pack(weight, 32, Convention.exact)
        assert len(loads) == already
