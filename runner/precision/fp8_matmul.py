"""FP8 matmuls on a GPU that has them: torch's blockwise `scaled_mm`, and the layouts that it wants its scales in; experts in a
kernel of our own, because torch's grouped `scaled_mm` has no such scales.

Shape legend: M rows (tokens), K the contracted dimension, N outputs, E experts. cuBLASLt 12.9 offers 1 x 128 by 128 x 128 scaling
on Hopper (compute capability 9.x) alone; torch 2.13 refuses it elsewhere, and so does `missing` here, with the reason.

    operand        values               scales [logical]       what scaled_mm wants
    activations    e4m3 [M, K]          [M, K / 128]           the same shape with strides (1, M), M a multiple of 4
    weights        e4m3 [N, K] (as .t)  [N / 128, K / 128]     [K / 128 rounded up to 4, N / 128], strides (1, that)
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from runner.precision.formats.fp8 import BLOCK as FP8_BLOCK

ROW_MULTIPLE = 4  # scales of one column of groups start at 16-byte borders
BLOCK_MULTIPLE = 4
HOPPER = 9


def missing(device: torch.device) -> str | None:
    """Why this device has no blockwise FP8 matmul; None where it has."""
    if device.type != "cuda":
        return f"FP8 matmuls need a Hopper GPU, the trainer runs on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != HOPPER:
        return f"blockwise FP8 matmuls exist on Hopper (compute capability 9.x), this GPU has {major}.{minor}"
    if torch.version.cuda is None or tuple(int(part) for part in torch.version.cuda.split(".")[:2]) < (12, 9):
        return f"blockwise FP8 matmuls need CUDA 12.9, this torch was built for {torch.version.cuda}"
    return None


def activation_scales(scale: torch.Tensor) -> torch.Tensor:
    """fp32 [M, groups] -> the same values with strides (1, M)."""
    return scale.t().contiguous().t()


def weight_scales(scale: torch.Tensor) -> torch.Tensor:
    """fp32 [N / 128, K / 128] -> [K / 128 rounded up to 4, N / 128] with strides (1, rows); the added blocks are zero."""
    return F.pad(scale, (0, -scale.shape[-1] % BLOCK_MULTIPLE)).t()


def matmul(q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Activations e4m3 [M, K] with scales [M, K / 128], times weights e4m3 [N, K] with block scales -> bf16 [M, N].

    K and N are multiples of 128. Accumulated in fp32, group by group; rounded once to bf16.
    """
    rows = q.shape[0]
    rest = -rows % ROW_MULTIPLE
    if rest:
        q = F.pad(q.view(torch.uint8), (0, 0, 0, rest)).view(q.dtype)  # byte 0 is 0.0
        scale = F.pad(scale, (0, 0, 0, rest), value=1.0)
    if not q.shape[0]:
        return torch.empty(0, weight_q.shape[0], dtype=torch.bfloat16, device=q.device)
    out = _scaled_mm(q, weight_q.t(), activation_scales(scale), weight_scales(weight_scale))
    return out[:rows]


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    """a [M, K] row-major, b [K, N] column-major, scales laid out as above -> bf16 [M, N]."""
    kinds = F.ScalingType
    return F.scaled_mm(a, b, scale_a, kinds.BlockWise1x128, scale_b, kinds.BlockWise128x128, output_dtype=torch.bfloat16)


def grouped(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The same for rows in expert order, `ends` int32 [E], and weights e4m3 [E, N, K] with their block scales -> bf16 [M, N]."""
    if not q.shape[0]:
        return torch.empty(0, weight_q.shape[1], dtype=torch.bfloat16, device=q.device)
    return _grouped(q, scale, weight_q, weight_scale, ends)


def _grouped(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    from runner.precision.kernels import gpu_fp8_grouped

    return gpu_fp8_grouped.matmul(q, scale, weight_q, weight_scale, ends)


def transposed(weight_q: torch.Tensor, weight_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [..., N, K] as [..., K, N], for the gradient of the input: square blocks only trade places."""
    values = weight_q.view(torch.uint8).transpose(-2, -1).contiguous().view(weight_q.dtype)
    return values, weight_scale.transpose(-2, -1).contiguous()


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight [..., N, K] divides into whole blocks."""
    return shape[-1] % FP8_BLOCK == 0 and shape[-2] % FP8_BLOCK == 0
