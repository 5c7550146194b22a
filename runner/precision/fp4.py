"""FP4 e2m1 weights: MXFP4 (groups of 32, power-of-two e8m0 scales) and NVFP4 (groups of 16, e4m3 scales, one fp32
scale per tensor), as compressed-tensors stores them.

Values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even mantissa. Codes: magnitude index in bits
0-2, the weight's sign bit in bit 3, also where it rounds to zero: -0.0 keeps its code when it is quantized again. Two
codes per byte, the first value in the low nibble.

MXFP4   e8m0 = 127 + floor(log2(amax)) - 2, one more where amax has a mantissa of 1.75 and above; clamped to 0..254
        scale = 2^(e8m0 - 127);  code of w / scale;  dequantized = bf16(value * scale)
NVFP4   global = fp32(448 * 6 / amax of the tensor, or of all that share it) (1 where that is not finite)
        scale  = e4m3(clamp(fp32(global * bf16(amax of the group / 6)))), 0.125 where that is zero
        code of fp32(w) / (scale / global);  dequantized = bf16(value * fp32(scale / global))

Shape legend: weights [..., out, in]; scales [..., out, in / group]; global scales [..., 1]: one per matrix, so
every expert of a stack has its own. Packed codes uint8 [..., out, in / 2].
"""

from __future__ import annotations

import torch

from runner.precision.checks import WeightError, as_bf16, check_amax
from runner.precision.formats.mxfp4 import GROUP as MXFP4_GROUP
from runner.precision.formats.nvfp4 import GROUP as NVFP4_GROUP
from runner.precision.int4 import BF16_MAX, groups_of

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# (threshold, inclusive): a magnitude at or past it has at least the next index; halves go to the even mantissa
_STEPS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
E4M3_MAX = 448.0
FP4_MAX = 6.0


def encode_fp4(values: torch.Tensor) -> torch.Tensor:
    """Nearest e2m1 codes (uint8, 0..15) of float values; magnitudes above 6 become 6."""
    magnitude = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for threshold, inclusive in _STEPS:
        code += (magnitude >= threshold if inclusive else magnitude > threshold).to(torch.uint8)
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def decode_fp4(code: torch.Tensor) -> torch.Tensor:
    """e2m1 codes -> fp32 values (code 8 is -0.0)."""
    table = torch.tensor([*FP4_VALUES, *(-value for value in FP4_VALUES)], dtype=torch.float32, device=code.device)
    return table[code.long()]


def pack(code: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [..., in] -> uint8 [..., in / 2], the first of a pair in the low nibble."""
    if code.shape[-1] % 2:
        raise WeightError(f"in dimension {code.shape[-1]} is odd, two FP4 values share a byte")
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def mxfp4_scales(weight: torch.Tensor) -> torch.Tensor:
    """e8m0 scales uint8 [..., out, in / 32]."""
    amax = groups_of(as_bf16(weight), MXFP4_GROUP).abs().amax(-1)
    check_amax(amax, BF16_MAX)
    exponent = (amax.float().view(torch.int32) + (1 << 21)) >> 23  # adding a quarter carries mantissas from 1.75 up
    return (exponent - 2).clamp_(0, 254).to(torch.uint8)


def e8m0_to_float(scale: torch.Tensor) -> torch.Tensor:
    """2^(e8m0 - 127) in fp32, exact: the exponent is written into the bits (0 gives the subnormal 2^-127, 255 infinity)."""
    bits = scale.to(torch.int32) << 23
    return torch.where(bits == 0, torch.full_like(bits, 1 << 22), bits).view(torch.float32)


def quantize_mxfp4(weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [..., out, in] -> (codes uint8 [..., out, in], e8m0 scales uint8); `scale` given: kept scales."""
    grouped = groups_of(as_bf16(weight), MXFP4_GROUP)
    derived = mxfp4_scales(weight)
    scale = derived if scale is None else scale
    if scale.shape != derived.shape or scale.dtype != torch.uint8:
        raise WeightError(f"kept e8m0 scales are {scale.dtype} {tuple(scale.shape)}, the grid needs {tuple(derived.shape)}")
    return encode_fp4((grouped / e8m0_to_float(scale).unsqueeze(-1)).to(torch.bfloat16)).flatten(-2), scale


def dequantize_mxfp4(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """bf16(value * 2^(e8m0 - 127)): exact for every code and every scale up to 252, that of weights of 1e38."""
    grouped = decode_fp4(code).unflatten(-1, (-1, MXFP4_GROUP))
    return (grouped * e8m0_to_float(scale).unsqueeze(-1)).to(torch.bfloat16).flatten(-2)


def _nvfp4_amax(weight: torch.Tensor) -> torch.Tensor:
    """bf16 [..., out, in / 16]; raises WeightError on NaN and infinities."""
    amax = groups_of(as_bf16(weight), NVFP4_GROUP).abs().amax(-1)
    check_amax(amax, BF16_MAX)
    return amax


def nvfp4_amax(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each matrix, bf16 [..., 1]; of weights that share a global scale, take the largest."""
    return _nvfp4_amax(weight).flatten(-2).amax(-1, keepdim=True)


def nvfp4_global_scale(amax: torch.Tensor) -> torch.Tensor:
    """fp32 global scale [..., 1] of the weights whose largest magnitude this is."""
    global_scale = (E4M3_MAX * FP4_MAX / amax.clamp(min=torch.finfo(torch.bfloat16).tiny)).float()
    return torch.where(torch.isfinite(global_scale), global_scale, torch.ones_like(global_scale))


def nvfp4_scales(weight: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """e4m3 group scales [..., out, in / 16] under a global scale [..., 1]."""
    local = global_scale.unsqueeze(-1) * (_nvfp4_amax(weight) / FP4_MAX).float()
    scale = local.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return torch.where(scale.float() == 0, torch.full_like(local, 0.125), scale.float()).to(torch.float8_e4m3fn)


def _nvfp4_factor(scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    return (scale.float() / global_scale.unsqueeze(-1)).unsqueeze(-1)


def quantize_nvfp4(
    weight: torch.Tensor, scale: torch.Tensor | None = None, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight [..., out, in] -> (codes uint8, e4m3 scales, fp32 global scale [..., 1]); both scales given: kept."""
    grouped = groups_of(as_bf16(weight), NVFP4_GROUP)
    if scale is None or global_scale is None:
        global_scale = nvfp4_global_scale(nvfp4_amax(weight))
        scale = nvfp4_scales(weight, global_scale)
    else:
        check_amax(grouped.abs().amax(-1), BF16_MAX)
        if scale.shape != grouped.shape[:-1]:
            raise WeightError(f"kept scales have shape {tuple(scale.shape)}, the grid needs {tuple(grouped.shape[:-1])}")
    return encode_fp4(grouped.float() / _nvfp4_factor(scale, global_scale)).flatten(-2), scale, global_scale


def dequantize_nvfp4(code: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """bf16(value * fp32(scale / global))."""
    grouped = decode_fp4(code).unflatten(-1, (-1, NVFP4_GROUP))
    return (grouped * _nvfp4_factor(scale, global_scale)).to(torch.bfloat16).flatten(-2)
