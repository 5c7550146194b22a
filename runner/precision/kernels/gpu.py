"""INT4 on a GPU, in Triton: quantize-dequantize in place, quantize + pack and unpack, with the bits of `int4.py`.

One program handles a tile of groups [GROUPS, GROUP]; a weight is read once and written once, scales are written beside.
The arithmetic is the reference's own: IEEE fp32 divisions (`div_rn`), rounded to bf16 by integer arithmetic, so that
no compiler setting changes a bit. Groups of a power of two from 16 to 4096 along `in`; stacked experts are rows.

The kernels run on a CPU too, through Triton's interpreter (TRITON_INTERPRET=1): that is how CI tests their bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runner.config.schema import Convention
from runner.precision import int4
from runner.precision.checks import as_bf16, check_scale

TILE = 4096  # weights per program
_CONVENTIONS = {Convention.exact: 0, Convention.kimi: 1, Convention.llmcompressor: 2}


@triton.jit
def _round_to_bf16_bits(values):
    """fp32 -> bf16 bits (int32, low 16 used), half to even; finite inputs."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _from_bf16_bits(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scale_bits(amax_bits, CONVENTION: tl.constexpr):
    """bf16 bits of each group's scale from the bits of its amax."""
    amax = _from_bf16_bits(amax_bits)
    divisor = tl.full(amax.shape, 7.5 if CONVENTION == 2 else 7.0, tl.float32)
    quotient = tl.div_rn(amax, divisor)
    if CONVENTION == 0:
        bits = quotient.to(tl.int32, bitcast=True)
        scale = ((bits + 0x3FFFF + ((bits >> 19) & 1)) & -0x80000) >> 16
    else:
        scale = _round_to_bf16_bits(quotient)
    return tl.where(scale == 0, 0x3C00, scale)


@triton.jit
def _integers(bits, scale, CONVENTION: tl.constexpr):
    """Integers (int32) of bf16 bits [GROUPS, GROUP] with fp32 scales [GROUPS, 1]."""
    magnitude = _from_bf16_bits(bits & 0x7FFF)
    quotient = _from_bf16_bits(_round_to_bf16_bits(tl.div_rn(magnitude, scale + tl.zeros_like(magnitude))))
    # half to even: below 8.5 the fp32 sum with 2^23 rounds to an integer; larger quotients are clamped first
    count = ((tl.minimum(quotient, 8.0) + 8388608.0) - 8388608.0).to(tl.int32)
    negative = (bits & 0x8000) != 0
    largest = tl.where(negative, 8 if CONVENTION == 2 else 7, 7)
    count = tl.minimum(count, largest)
    return tl.where(negative, -count, count)


@triton.jit
def _load_groups(weight, first, groups, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    rows = first + tl.arange(0, GROUPS)
    offsets = rows.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (rows < groups)[:, None]
    return tl.load(weight + offsets, mask=inside, other=0).to(tl.int32) & 0xFFFF, offsets, inside, rows


@triton.jit
def _group_scales(bits, scales, rows, groups, CONVENTION: tl.constexpr, KEEP: tl.constexpr):
    if KEEP:
        scale = tl.load(scales + rows, mask=rows < groups, other=0x3C00).to(tl.int32) & 0xFFFF
    else:
        scale = _scale_bits(tl.max(bits & 0x7FFF, axis=1), CONVENTION)
        tl.store(scales + rows, scale.to(tl.int16), mask=rows < groups)
    return _from_bf16_bits(scale)[:, None]


@triton.jit
def _quantize_dequantize_kernel(
    weight, scales, largest, groups, limit,
    CONVENTION: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    bits, offsets, inside, rows = _load_groups(weight, tl.program_id(0) * GROUPS, groups, GROUPS, GROUP)
    amax = tl.max(bits & 0x7FFF, axis=1)
    tl.atomic_max(largest, tl.max(amax, axis=0))
    scale = _group_scales(bits, scales, rows, groups, CONVENTION, KEEP)
    product = _integers(bits, scale, CONVENTION).to(tl.float32) * scale
    # +0.0 where an integer is 0, and bad groups stay as they came in, so that the error can say what they hold
    writable = inside & (amax < limit)[:, None]
    tl.store(weight + offsets, _round_to_bf16_bits(product).to(tl.int16), mask=writable)


@triton.jit
def _quantize_pack_kernel(
    weight, scales, packed, largest, groups,
    CONVENTION: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    bits, _offsets, _inside, rows = _load_groups(weight, tl.program_id(0) * GROUPS, groups, GROUPS, GROUP)
    tl.atomic_max(largest, tl.max(tl.max(bits & 0x7FFF, axis=1), axis=0))
    scale = _group_scales(bits, scales, rows, groups, CONVENTION, KEEP)
    nibbles = tl.reshape(_integers(bits, scale, CONVENTION) + 8, (GROUPS, GROUP // 8, 8))
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


def _raise_if_bad(
    largest: torch.Tensor, limit: int, weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None
) -> None:
    if int(largest) >= limit:
        int4.quantize(weight, group_size, convention, scale)  # raises, with what is wrong


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
    _raise_if_bad(largest, limit, weight, group_size, convention, scale)
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
        source.view(torch.int16), scales.view(torch.int16), packed, largest, groups,
        CONVENTION=_CONVENTIONS[convention], KEEP=scale is not None, GROUPS=tile, GROUP=width,
    )  # fmt: skip
    _raise_if_bad(largest, limit, weight, group_size, convention, scale)
    return packed, scales


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., in / 8] -> int8 [..., in]."""
    q = torch.empty((*packed.shape[:-1], packed.shape[-1] * 8), dtype=torch.int8, device=packed.device)
    block = TILE // 8
    _unpack_kernel[(triton.cdiv(packed.numel(), block),)](packed.contiguous(), q, packed.numel(), BLOCK=block)
    return q
