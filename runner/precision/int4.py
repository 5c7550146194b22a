"""INT4 (W4A16) and INT8 (W8A16) group quantization: the reference, in plain torch.

Shape legend: weights [..., out, in], scales [..., out, in / group], packed [..., out, in / 8] (INT4) or
[..., out, in / 4] (INT8). Any leading dimensions, stacked experts [E, out, in] among them.

A group is `group_size` neighbours along `in` (-1: the whole row). With amax its largest magnitude in bf16, Q the
largest integer (7 or 127) and low the smallest:

    convention      scale                                                         integers    follows
    exact           fp32(amax / 7) rounded half to even to 5 significant bits     -7 .. 7     this project
    kimi            bf16(fp32(amax / Q))                                          -Q .. Q     Kimi-K2-Thinking, slime
    llmcompressor   bf16(fp32(amax / (Q + 0.5)))                                  -Q-1 .. Q   llm-compressor, round to nearest

    q           = clamp(round_half_even(bf16(w / scale)), low, Q)
    dequantized = bf16(q * scale)

`kimi` has slime's scales, bit for bit, and not all of its integers: slime divides by the scale before it is rounded to bf16, here
(and in compressed-tensors, which reads such checkpoints) by the stored one. Of slime's integers 98.98% to 99.80% came out equal.
The quotient is rounded to bf16 before it is rounded to an integer, as compressed-tensors does for bf16 weights.
Under `exact` an integer has 3 significant bits and a scale 5, so a product has at most 8 and is exact in bf16:
a kernel that rounds products and one that does not compute with the same weights.
INT8 is for converting only: bf16 has 8 significant bits, so a dequantized INT8 weight may round to a neighbour when it is
quantized again, even with its own scales. INT4 never does.
A group whose scale would be zero gets the scale 2^-7 (bf16's epsilon, as compressed-tensors) and zero integers.
"""

from __future__ import annotations

import torch

from runner.config.schema import Convention
from runner.precision.checks import WeightError, as_bf16, check_amax, check_scale

ZERO_GROUP_SCALE = 2.0**-7
BF16_MAX = float(torch.finfo(torch.bfloat16).max)


def integer_range(convention: Convention, bits: int = 4) -> tuple[int, int]:
    """Smallest and largest integer of a convention."""
    largest = 2 ** (bits - 1) - 1
    return (-largest - 1 if convention is Convention.llmcompressor else -largest), largest


def divisor(convention: Convention, bits: int = 4) -> float:
    """What amax is divided by; raises WeightError for int8 under `exact`, which does not exist."""
    if bits == 8 and convention is Convention.exact:
        raise WeightError("convention exact does not exist for int8")
    largest = 2 ** (bits - 1) - 1
    return largest + 0.5 if convention is Convention.llmcompressor else float(largest)


def groups_of(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., out, in] -> [..., out, in / group, group]; raises WeightError where groups do not divide."""
    width = weight.shape[-1] if group_size == -1 else group_size
    if width <= 0 or weight.shape[-1] % width:
        raise WeightError(f"in dimension {weight.shape[-1]} is not a multiple of group_size {group_size}")
    return weight.unflatten(-1, (weight.shape[-1] // width, width))


def round_to_5_bits(values: torch.Tensor) -> torch.Tensor:
    """fp32 -> the nearest fp32 with 5 significant bits, half to even (4 stored mantissa bits; subnormals lose more)."""
    bits = values.contiguous().view(torch.int32)
    return ((bits + 0x3FFFF + ((bits >> 19) & 1)) & ~0x7FFFF).view(torch.float32)


def scales_from_amax(amax: torch.Tensor, convention: Convention, bits: int = 4) -> torch.Tensor:
    """amax (bf16 values, any shape) -> bf16 scales of the convention, before any check."""
    quotient = amax.float() / divisor(convention, bits)
    scale = (round_to_5_bits(quotient) if convention is Convention.exact else quotient).to(torch.bfloat16)
    return torch.where(scale == 0, torch.full_like(scale, ZERO_GROUP_SCALE), scale)


def group_scales(weight: torch.Tensor, group_size: int, convention: Convention, bits: int = 4) -> torch.Tensor:
    """bf16 scales [..., out, in / group]; raises WeightError on NaN, infinity or overflow."""
    amax = groups_of(as_bf16(weight), group_size).abs().amax(-1)
    scale = scales_from_amax(amax, convention, bits)
    # the largest product q * scale must round to a finite bf16: below max + half an ulp
    largest = max(-integer_range(convention, bits)[0], integer_range(convention, bits)[1])
    check_amax(amax, BF16_MAX)
    check_amax((scale.double() * largest).to(torch.bfloat16).float(), BF16_MAX)
    return scale


def quantize(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None = None, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [..., out, in] -> (integers int8 [..., out, in], scales bf16 [..., out, in / group]).

    With `scale` those scales are kept instead of derived: quantizing dequantized INT4 weights with their own scales
    gives their own integers. fp32 weights are rounded to bf16 first. Raises WeightError on NaN, infinities and
    groups that do not divide.
    """
    grouped = groups_of(as_bf16(weight), group_size)
    if scale is None:
        scale = group_scales(weight, group_size, convention, bits)
    else:
        check_scale(scale, tuple(grouped.shape[:-1]))
        check_amax(grouped.abs().amax(-1), BF16_MAX)
    low, high = integer_range(convention, bits)
    quotient = grouped / scale.to(torch.bfloat16).unsqueeze(-1)  # torch divides in fp32 and rounds once to bf16
    return quotient.round_().clamp_(low, high).to(torch.int8).flatten(-2), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
    """Integers [..., out, in] and scales [..., out, groups] -> bf16(q * scale) [..., out, in].

    `zero_point` int8, shaped as the scales: bf16((q - zero_point) * scale), for asymmetric foreign checkpoints.
    """
    if q.shape[-1] % scale.shape[-1]:
        raise WeightError(f"{scale.shape[-1]} scales do not divide a row of {q.shape[-1]} weights")
    grouped = q.unflatten(-1, (scale.shape[-1], q.shape[-1] // scale.shape[-1])).to(torch.bfloat16)
    if zero_point is not None:
        grouped = grouped - zero_point.to(torch.bfloat16).unsqueeze(-1)
    return (grouped * scale.unsqueeze(-1).to(scale.dtype)).to(torch.bfloat16).flatten(-2)


def quantize_dequantize(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None = None, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16 effective weights [..., out, in], scales): dequantize(quantize(weight))."""
    q, scale = quantize(weight, group_size, convention, scale, bits)
    return dequantize(q, scale), scale


def pack(q: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int8 integers [..., in] -> int32 [..., ceil(in * bits / 32)], compressed-tensors `pack-quantized`.

    Each integer is stored as q + 2^(bits - 1), lowest bits first, along the input dimension; a rest is filled with 0.
    """
    per_word = 32 // bits
    words = q.to(torch.int32) + (1 << (bits - 1))
    rest = -q.shape[-1] % per_word
    if rest:
        words = torch.nn.functional.pad(words, (0, rest))
    words = words.unflatten(-1, (-1, per_word))
    packed = words[..., 0].clone()
    for i in range(1, per_word):
        packed |= words[..., i] << (bits * i)
    return packed


def unpack(packed: torch.Tensor, in_features: int, bits: int = 4, dim: int = -1) -> torch.Tensor:
    """Inverse of `pack`: int32 -> int8 with `in_features` values along `dim`.

    compressed-tensors packs zero points [out, groups] along the output dimension: unpack those with dim=-2.
    """
    if dim != -1:
        return unpack(packed.transpose(dim, -1), in_features, bits).transpose(dim, -1).contiguous()
    if packed.shape[-1] != -(-in_features * bits // 32):
        raise WeightError(f"packed width {packed.shape[-1]} does not hold {in_features} values of {bits} bits")
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = ((packed.unsqueeze(-1) >> shifts) & mask) - offset
    return values.to(torch.int8).flatten(-2)[..., :in_features].contiguous()
