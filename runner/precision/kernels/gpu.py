"""INT4 on a GPU, in Triton: quantize-dequantize in place, quantize + pack and unpack, with the bits of `int4.py`.

One program handles a tile of groups [GROUPS, GROUP]; a weight is read once and written once, scales are written beside.
There is one reciprocal per group and no division, and no product is followed by a sum that a compiler could fuse with it:
20 to 22 instructions per weight (counted by tests/test_triton_compiles.py; not timed). By the data sheet's clock and bandwidth an
H200 has issue slots for about 24 while it copies the 4 bytes of quantize-dequantize, and for about 15 in the 2.5 bytes of
quantize + pack, which these instructions would therefore hold to some 70% of a copy. Groups of a power of two
from 16 to 4096 along `in`; stacked experts are rows.

The kernels run on a CPU too, through Triton's interpreter (TRITON_INTERPRET=1): that is how CI tests their bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runner.config.schema import Convention
from runner.precision import int4, kernels
from runner.precision.checks import as_bf16, check_scale

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = 4096  # weights per program
_CONVENTIONS = {Convention.exact: 0, Convention.kimi: 1, Convention.llmcompressor: 2}


@triton.jit
def round_to_bf16_bits(values):
    """fp32 -> bf16 bits (int32, low 16 used), half to even; finite inputs. A GPU rounds two at once in one instruction
    (cvt.rn.bf16x2.f32); the interpreter cuts off instead of rounding, so there integers do it."""
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        found = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
    else:
        found = values.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return found


@triton.jit
def _from_bf16_bits(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scale_bits(amax_bits, CONVENTION: tl.constexpr):
    """bf16 bits of each group's scale from the bits of its amax. A product with the rounded 1 / 7 or 1 / 7.5 rounds to the same
    scale as the quotient for every bf16 number (tests/test_reciprocal.py goes through them)."""
    quotient = _from_bf16_bits(amax_bits) * (0.13333334028720856 if CONVENTION == 2 else 0.1428571492433548)
    if CONVENTION == 0:
        bits = quotient.to(tl.int32, bitcast=True)
        scale = ((bits + 0x3FFFF + ((bits >> 19) & 1)) & -0x80000) >> 16
    else:
        scale = round_to_bf16_bits(quotient)
    return tl.where(scale == 0, 0x3C00, scale)


@triton.jit
def _quotients(bits, scale, CONVENTION: tl.constexpr):
    """bf16(weight / scale), clamped to the integers' range, fp32: bf16 bits [GROUPS, GROUP] (int32), fp32 scales [GROUPS].

    One reciprocal per group: bf16(weight * (1 / scale)) is bf16(weight / scale). Where bf16 rounds up or down is decided at
    numbers B / 2^j with B odd and 9 bits long. A quotient of 8-bit significands m / n is never one of them (the odd part of B * n
    has 9 bits or more, m has not), so it differs from each by more than 2^-18 of itself; the roundings here (1 / x within 2 units
    in the last place, as a GPU's fast division has it, and one product) move it by less than 2^-21.
    Scales far from 1 are brought near it by 2^64 or 2^-64 along with their weights, so that neither the reciprocal nor a product
    that matters leaves fp32's normal numbers; what overflows is clamped, what underflows rounds to 0. tests/test_reciprocal.py
    has every pair.
    """
    shift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # below 2^-60: 2^64
    shift = tl.where(scale > 1152921504606846976.0, 5.421010862427522e-20, shift)  # above 2^60: 2^-64
    reciprocal = 1.0 / (scale * shift)
    quotient = (_from_bf16_bits(bits) * shift[:, None]) * reciprocal[:, None]
    quotient = _from_bf16_bits(round_to_bf16_bits(quotient))
    low = -8.0 if CONVENTION == 2 else -7.0
    return tl.minimum(tl.maximum(quotient, low), 7.0)


@triton.jit
def _load_groups(weight, first, groups, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    rows = first + tl.arange(0, GROUPS)
    offsets = rows.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (rows < groups)[:, None]
    return tl.load(weight + offsets, mask=inside, other=0).to(tl.int32), offsets, inside, rows


@triton.jit
def _group_scales(bits, scales, largest, rows, groups, limit, CONVENTION: tl.constexpr, KEEP: tl.constexpr):
    """(fp32 scales, amax bits) of the groups; `largest` hears of bad ones only."""
    amax = tl.max(bits & 0x7FFF, axis=1)
    worst = tl.max(amax, axis=0)
    tl.atomic_max(largest, worst, mask=worst >= limit, sem="relaxed")
    if KEEP:
        scale = tl.load(scales + rows, mask=rows < groups, other=0x3C00).to(tl.int32) & 0xFFFF
    else:
        scale = _scale_bits(amax, CONVENTION)
        tl.store(scales + rows, scale.to(tl.int16), mask=rows < groups)
    return _from_bf16_bits(scale), amax


@triton.jit
def _quantize_dequantize_kernel(
    weight, scales, largest, groups, limit,
    CONVENTION: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    bits, offsets, inside, rows = _load_groups(weight, tl.program_id(0) * GROUPS, groups, GROUPS, GROUP)
    scale, amax = _group_scales(bits, scales, largest, rows, groups, limit, CONVENTION, KEEP)
    # half to even: the sum with 1.5 * 2^23 rounds to an integer; x - x is +0.0, as in the reference
    integers = (_quotients(bits, scale, CONVENTION) + 12582912.0) - 12582912.0
    product = round_to_bf16_bits(integers * scale[:, None])
    # bad groups stay as they came in, so that the error can say what they hold
    tl.store(weight + offsets, product.to(tl.int16), mask=inside & (amax < limit)[:, None])


@triton.jit
def _quantize_pack_kernel(
    weight, scales, packed, largest, groups, limit,
    CONVENTION: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    bits, _offsets, _inside, rows = _load_groups(weight, tl.program_id(0) * GROUPS, groups, GROUPS, GROUP)
    scale, _amax = _group_scales(bits, scales, largest, rows, groups, limit, CONVENTION, KEEP)
    # the low bits of the sum with 1.5 * 2^23 + 8 are the integer + 8
    nibbles = (_quotients(bits, scale, CONVENTION) + 12582920.0).to(tl.int32, bitcast=True) & 15
    nibbles = tl.reshape(nibbles, (GROUPS, GROUP // 8, 8))
    words = tl.sum(nibbles << (4 * tl.arange(0, 8))[None, None, :], axis=2)  # nibbles do not overlap: a sum is an or
    columns = rows.to(tl.int64)[:, None] * (GROUP // 8) + tl.arange(0, GROUP // 8)[None, :]
    tl.store(packed + columns, words, mask=(rows < groups)[:, None])


@triton.jit
def _unpack_kernel(packed, q, words, BLOCK: tl.constexpr):
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = index < words
    word = tl.load(packed + index, mask=inside, other=0)
    lanes = tl.arange(0, 8)
    values = ((word[:, None] >> (4 * lanes)[None, :]) & 15) - 8
    tl.store(q + index[:, None] * 8 + lanes[None, :], values.to(tl.int8), mask=inside[:, None])


def _scales_for(weight: torch.Tensor, width: int, scale: torch.Tensor | None) -> torch.Tensor:
    shape = (*weight.shape[:-1], weight.shape[-1] // width)
    if scale is None:
        return torch.empty(shape, dtype=torch.bfloat16, device=weight.device)
    check_scale(scale, shape)
    return scale.to(torch.bfloat16).contiguous()


@dataclass(frozen=True)
class Quantized:
    """Where a kernel told of the largest bad amax (bits, from `limit` on), and the reference that raises with what is wrong."""

    largest: torch.Tensor
    limit: int
    explain: Callable[[], object]


_later: ContextVar[list[Quantized] | None] = ContextVar("_later", default=None)


@contextlib.contextmanager
def checked_together() -> Iterator[None]:
    """Bad groups of the tensors quantized inside raise BadWeights at the end: the host waits once, not per tensor."""
    found: list[Quantized] = []
    token = _later.set(found)
    try:
        yield
    finally:
        _later.reset(token)
    if found:
        limits = torch.tensor([item.limit for item in found])
        bad = (torch.cat([item.largest for item in found]).cpu() >= limits).sum()
        if bad:
            raise kernels.BadWeights(f"{int(bad)} of {len(found)} quantized weights hold NaN, infinities or what overflows")


def check(item: Quantized) -> None:
    """Bad groups raise WeightError now, or BadWeights at the end of `checked_together`."""
    found = _later.get()
    if found is not None:
        found.append(item)
    elif int(item.largest) >= item.limit:
        item.explain()


def quantize_dequantize_(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None, limit: int
) -> torch.Tensor:
    """bf16 weight [..., out, in], contiguous, in place -> scales bf16; amax bits from `limit` on are an error."""
    width = weight.shape[-1] if group_size == -1 else group_size
    scales, groups = _scales_for(weight, width, scale), weight.numel() // width
    largest = torch.zeros(1, dtype=torch.int32, device=weight.device)
    tile = max(1, TILE // width)
    _quantize_dequantize_kernel[(triton.cdiv(groups, tile),)](
        weight.detach().view(torch.int16), scales.view(torch.int16), largest, groups, limit,
        CONVENTION=_CONVENTIONS[convention], KEEP=scale is not None, GROUPS=tile, GROUP=width,
    )  # fmt: skip
    check(Quantized(largest, limit, lambda: int4.quantize(weight, group_size, convention, scale)))
    return scales


def quantize_pack(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [..., out, in] -> (packed int32 [..., out, in / 8], scales bf16)."""
    source = as_bf16(weight).contiguous()
    width = source.shape[-1] if group_size == -1 else group_size
    scales, groups = _scales_for(source, width, scale), source.numel() // width
    packed = torch.empty((*source.shape[:-1], source.shape[-1] // 8), dtype=torch.int32, device=source.device)
    largest = torch.zeros(1, dtype=torch.int32, device=source.device)
    tile = max(1, TILE // width)
    _quantize_pack_kernel[(triton.cdiv(groups, tile),)](
        source.view(torch.int16), scales.view(torch.int16), packed, largest, groups, limit,
        CONVENTION=_CONVENTIONS[convention], KEEP=scale is not None, GROUPS=tile, GROUP=width,
    )  # fmt: skip
    check(Quantized(largest, limit, lambda: int4.quantize(weight, group_size, convention, scale)))
    return packed, scales


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., in / 8] -> int8 [..., in]."""
    q = torch.empty((*packed.shape[:-1], packed.shape[-1] * 8), dtype=torch.int8, device=packed.device)
    block = TILE // 8
    _unpack_kernel[(triton.cdiv(packed.numel(), block),)](packed.contiguous(), q, packed.numel(), BLOCK=block)
    return q
