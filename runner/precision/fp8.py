"""FP8 e4m3: 128 x 128 weight blocks, 1 x 128 activation groups, channel and tensor scales; fp32 scales.

    scale       = fp32(amax / 448), 2^-23 for an all-zero block (as compressed-tensors)
    q           = e4m3(clamp(fp32(w) / scale, -448, 448))      round half to even
    dequantized = bf16(fp32(q) * scale)

Shape legend: weights [..., out, in]; block scales [..., ceil(out / 128), ceil(in / 128)]; channel [..., out, 1];
tensor [..., 1]. DeepSeek-V3 names block scales `weight_scale_inv` although they are what one multiplies with.
"""

from __future__ import annotations

import torch

from runner.precision import kernels
from runner.precision.checks import as_bf16, check_amax, check_scale
from runner.precision.formats.fp8 import BLOCK
from runner.precision.formats.fp8 import scale_shape as scale_shape

FP8_BLOCK = BLOCK
E4M3_MAX = 448.0
ZERO_BLOCK_SCALE = 2.0**-23
FP32_MAX = float(torch.finfo(torch.float32).max)


def _amax(weight: torch.Tensor, strategy: str, block: int) -> torch.Tensor:
    magnitude = weight.float().abs()
    if strategy == "channel":
        return magnitude.amax(-1, keepdim=True)
    if strategy == "tensor":
        return magnitude.flatten(-2).amax(-1, keepdim=True)
    *leading, rows, columns = weight.shape
    padded = torch.nn.functional.pad(magnitude, (0, -columns % block, 0, -rows % block))
    return padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block)).amax((-3, -1))


def expand_scale(scale: torch.Tensor, shape: tuple[int, ...], strategy: str, block: int = FP8_BLOCK) -> torch.Tensor:
    """Scales broadcastable to a weight of `shape`; blocks at the border are cut."""
    if strategy == "channel":
        return scale
    if strategy == "tensor":
        return scale.unsqueeze(-1)
    rows, columns = shape[-2:]
    return scale.repeat_interleave(block, -2)[..., :rows, :].repeat_interleave(block, -1)[..., :columns]


def scales_from_amax(amax: torch.Tensor) -> torch.Tensor:
    scale = amax.float() / E4M3_MAX
    return torch.where(scale == 0, torch.full_like(scale, ZERO_BLOCK_SCALE), scale)


def quantize(
    weight: torch.Tensor, strategy: str = "block", scale: torch.Tensor | None = None, block: int = FP8_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [..., out, in] -> (float8_e4m3fn [..., out, in], fp32 scales); `scale` given: kept scales.

    fp32 weights are rounded to bf16 first. Raises WeightError on NaN and infinities.
    """
    weight = as_bf16(weight)
    amax = _amax(weight, strategy, block)
    check_amax(amax, FP32_MAX)
    if scale is None:
        scale = scales_from_amax(amax)
    else:
        check_scale(scale, scale_shape(tuple(weight.shape), strategy, block))
    quotient = weight.float() / expand_scale(scale, tuple(weight.shape), strategy, block)
    return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def regrid(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., out, in], the scales) of a weight that lies on the 128 x 128 grid of `scale` already: as `quantize`, but
    nothing is checked, so the host does not wait for a GPU."""
    quotient = weight.detach().float() / expand_scale(scale, tuple(weight.shape), "block")
    return quotient.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def dequantize(
    q: torch.Tensor, scale: torch.Tensor, strategy: str = "block", block: int = FP8_BLOCK, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """fp32(q) * scale, rounded once to `dtype`."""
    return (q.float() * expand_scale(scale, tuple(q.shape), strategy, block)).to(dtype)


def quantize_dequantize(
    weight: torch.Tensor, strategy: str = "block", scale: torch.Tensor | None = None, block: int = FP8_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(bf16 effective weights, fp32 scales)."""
    q, scale = quantize(weight, strategy, scale, block)
    return dequantize(q, scale, strategy, block), scale


def quantize_activations(x: torch.Tensor, group: int = FP8_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [..., features] -> (e4m3 [..., features], fp32 scales [..., ceil(features / group)]).

    Each token's groups of 128 features share a scale (1 x 128). Activations may be infinite in a diverging run: that
    gives NaN outputs, which the trainer's own NaN handling sees, so nothing is raised here.
    """
    on_gpu = kernels.for_fp8(x)
    if on_gpu is not None and group == FP8_BLOCK and on_gpu.suits(x):
        found: tuple[torch.Tensor, torch.Tensor] = on_gpu.quantize_activations(x)
        return found
    features = x.shape[-1]
    values = x.float()
    padded = torch.nn.functional.pad(values, (0, -features % group)).unflatten(-1, (-1, group))
    scale = scales_from_amax(padded.abs().amax(-1))
    q = (padded / scale.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :features]
    return q.to(torch.float8_e4m3fn), scale


def dequantize_activations(
    q: torch.Tensor, scale: torch.Tensor, group: int = FP8_BLOCK, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Inverse of `quantize_activations`, rounded once to `dtype`."""
    return (q.float() * scale.repeat_interleave(group, -1)[..., : q.shape[-1]]).to(dtype)


def quantize_dequantize_activations(x: torch.Tensor, group: int = FP8_BLOCK) -> torch.Tensor:
    """Activations as an FP8 matmul sees them, in the dtype of `x`."""
    on_gpu = kernels.for_fp8(x)
    if on_gpu is not None and group == FP8_BLOCK and on_gpu.suits(x):
        found: torch.Tensor = on_gpu.quantize_dequantize_activations(x)
        return found
    q, scale = quantize_activations(x, group)
    return dequantize_activations(q, scale, group, x.dtype)
