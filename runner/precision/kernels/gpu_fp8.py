"""FP8 e4m3 on a GPU, in Triton, with the bits of `fp8.py`: activations 1 x 128, weights 128 x 128 in place.

Everything is read once and written once. Values are divided by their scale with IEEE rounding (`div_rn`: amax / 448 is rounded
itself, so a quotient can lie within one part in 2^24 of the middle between two e4m3 numbers, and a product with a reciprocal can
fall on its other side), rounded to e4m3 by integer arithmetic, so that no compiler setting changes a bit.

The kernels run on a CPU too, through Triton's interpreter (TRITON_INTERPRET=1): that is how CI tests their bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from runner.precision import fp8
from runner.precision.kernels.gpu import INTERPRETED, Quantized, check, round_to_bf16_bits

GROUP_SIZE = fp8.FP8_BLOCK  # 128
ROWS = 32  # groups of 128 activations per program
INFINITE = 0x7F800000  # fp32 bits
BLOCKS = 65535  # CUDA's limit of a grid's second and third side


@triton.jit
def _scale_of(largest):
    """fp32 scales from fp32 amax bits: amax / 448, 2^-23 where that is 0."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, 448.0, tl.float32))
    return tl.where(scale == 0, 1.1920928955078125e-07, scale)


@triton.jit
def _rounded(quotient, HARDWARE: tl.constexpr):
    """(e4m3 codes, their fp32 values): fp32 quotients, clamped to 448, half to even; NaN stays NaN, the sign of 0 stays. Two
    at once in one instruction where there is one (cvt.rn.satfinite.e4m3x2.f32)."""
    if HARDWARE:
        e4m3 = quotient.to(tl.float8e4nv)
        code, value = e4m3.to(tl.uint8, bitcast=True).to(tl.int32), e4m3.to(tl.float32)
    else:
        code, value = _rounded_by_integers(quotient)
    return code, value


@triton.jit
def _rounded_by_integers(quotient):
    bits = quotient.to(tl.int32, bitcast=True)
    sign, magnitude = bits & -0x80000000, bits & 0x7FFFFFFF
    nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, 0x43E00000)
    kept = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) & -0x100000  # 3 bits of the fraction
    # below 2^-6 the grid is 2^-9 wide: the sum with 1.5 * 2^23 rounds to whole steps
    steps = magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0
    small = magnitude < 0x3C800000
    code = tl.where(small, steps.to(tl.int32, bitcast=True) & 15, (kept >> 20) - 960)
    value = tl.where(small, (steps - 12582912.0) * 0.001953125, kept.to(tl.float32, bitcast=True))
    code = tl.where(nan, 0x7F, code) | ((sign >> 24) & 0x80)
    value = tl.where(nan, bits, value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return code, value


@triton.jit
def _store(out, offsets, values, inside, BF16: tl.constexpr):
    """fp32 values rounded once to the output's dtype; bf16 by integers, half to even, NaN stays NaN."""
    if BF16:
        rounded = round_to_bf16_bits(values)
        if INTERPRETED:  # a GPU's own rounding knows NaN
            rounded = tl.where((values.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(out + offsets, rounded.to(tl.int16), mask=inside)
    else:
        tl.store(out + offsets, values, mask=inside)


@triton.jit
def _load(source, offsets, inside, BF16: tl.constexpr):
    """fp32 of bf16 bits (int16) or of fp32."""
    if BF16:
        found = (tl.load(source + offsets, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        found = tl.load(source + offsets, mask=inside, other=0.0)
    return found


@triton.jit
def _activations_kernel(
    source, values, scales, count, groups, features,
    BF16: tl.constexpr, DEQUANTIZE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Group g of token t is row t * groups + g; the last group of a token may be short."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (rows % groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    offsets = (rows // groups)[:, None] * features + column
    inside = (rows < count)[:, None] & (column < features)
    x = _load(source, offsets, inside, BF16)
    scale = _scale_of(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    code, rounded = _rounded(tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, GROUP))), HARDWARE)
    if DEQUANTIZE:
        _store(values, offsets, rounded * scale[:, None], inside, BF16)
    else:
        tl.store(values + offsets, code.to(tl.uint8), mask=inside)
        tl.store(scales + rows, scale, mask=rows < count)


@triton.jit
def _weight_kernel(
    weight, scales, largest, rows, columns, matrix, row,
    KEEP: tl.constexpr, GROUP: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """One 128 x 128 block, in place: [matrices, rows, columns] with strides (matrix, row, 1)."""
    down = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    along = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    offsets = tl.program_id(2).to(tl.int64) * matrix + down.to(tl.int64)[:, None] * row + along[None, :]
    inside = (down < rows)[:, None] & (along < columns)[None, :]
    x = _load(weight, offsets, inside, True)
    amax = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    tl.atomic_max(largest, amax, mask=amax >= 0x7F800000, sem="relaxed")
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    if KEEP:
        scale = tl.load(scales + block)
    else:
        scale = _scale_of(amax)
        tl.store(scales + block, scale)
    _code, rounded = _rounded(tl.div_rn(x, tl.full((GROUP, GROUP), 1.0, tl.float32) * scale), HARDWARE)
    # a bad block stays as it came in, so that the error can say what it holds
    _store(weight, offsets, rounded * scale, inside & (amax < 0x7F800000), True)


@lru_cache
def _hardware(device: torch.device) -> bool:
    """Whether a device rounds to e4m3 itself (from compute capability 8.9 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def suits(x: torch.Tensor) -> bool:
    """Whether these kernels read activations of this dtype."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.numel() > 0


def _activations(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *, dequantize: bool) -> None:
    features = x.shape[-1]
    groups = -(-features // GROUP_SIZE)
    count = x.numel() // features * groups
    _activations_kernel[(triton.cdiv(count, ROWS),)](
        _bits(x.detach()), values, scales, count, groups, features,
        BF16=x.dtype is torch.bfloat16, DEQUANTIZE=dequantize, ROWS=ROWS, GROUP=GROUP_SIZE, HARDWARE=_hardware(x.device),
    )  # fmt: skip


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., features], fp32 scales [..., ceil(features / 128)]) of bf16 or fp32 activations."""
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], -(-x.shape[-1] // GROUP_SIZE)), dtype=torch.float32, device=x.device)
    _activations(x, q, scales, dequantize=False)
    return q.view(torch.float8_e4m3fn), scales


def quantize_dequantize_activations(x: torch.Tensor) -> torch.Tensor:
    """Activations as an FP8 matmul sees them, in their own dtype, as fp8.quantize_dequantize_activations."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _activations(x, _bits(out), out, dequantize=True)
    return out


def suits_weight(weight: torch.Tensor) -> bool:
    """Whether a weight can be quantized in place: bf16 [out, in] or [experts, out, in] whose rows lie whole in memory."""
    blocks = fp8.scale_shape(tuple(weight.shape), "block")
    return (
        weight.dtype is torch.bfloat16
        and weight.dim() in (2, 3)
        and weight.stride(-1) == 1
        and weight.numel() > 0
        and all(side <= BLOCKS for side in blocks[:-1])
    )


def quantize_dequantize_(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """A weight's effective values in its place, by 128 x 128 blocks, kept scales or new ones -> fp32 scales. NaN and infinities
    are an error, told at once or at the end of `kernels.checked_together`."""
    shape = fp8.scale_shape(tuple(weight.shape), "block")
    kept = scale is not None
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device) if scale is None else scale.contiguous()
    largest = torch.zeros(1, dtype=torch.int32, device=weight.device)
    matrices = weight.shape[0] if weight.dim() == 3 else 1
    _weight_kernel[(shape[-1], shape[-2], matrices)](
        _bits(weight.detach()), scales, largest, weight.shape[-2], weight.shape[-1],
        weight.stride(0) if weight.dim() == 3 else 0, weight.stride(-2),
        KEEP=kept, GROUP=GROUP_SIZE, HARDWARE=_hardware(weight.device),
    )  # fmt: skip
    check(Quantized(largest, INFINITE, lambda: fp8.quantize(weight, scale=scale)))
    return scales
