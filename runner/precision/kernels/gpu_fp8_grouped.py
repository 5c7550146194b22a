"""FP8 matmul of many experts in one Triton kernel: activations 1 x 128, weights 128 x 128, accumulated in fp32 group by group.

torch's grouped `scaled_mm` (2.13, 2.14) has scales by row, MXFP8 and NVFP4, not these. How many rows an expert has stays on the
device: there are as many programs as there could be tiles, and each finds its own from the experts' ends, so nobody waits.

On Hopper one `dot` is one group of 128 on the tensor cores, whose own sum of e4m3 products is short of fp32; the groups are added
up in fp32 registers, as DeepSeek-V3 does. Not run on a GPU yet: the interpreter computes it (TRITON_INTERPRET=1), and its machine
code for Hopper is looked at.

Shape legend: M rows in expert order, E experts, N outputs, K inputs; N and K are multiples of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runner.precision.kernels.gpu import round_to_bf16_bits

GROUP = 128
ROWS = 64  # of one expert per program: a warp group's tile
STAGES = 4  # tiles of the next groups that are on their way to shared memory


@triton.jit
def _grouped_kernel(
    rows, row_scales, weights, weight_scales, ends, out, experts, outputs, inputs,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, GROUP] of out; neighbours are tiles of the same rows, which therefore stay in the cache. EXPERTS: `experts`
    rounded up to a power of two."""
    blocks, groups = outputs // GROUP, inputs // GROUP
    tile, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index = tl.arange(0, EXPERTS)
    stops = tl.load(ends + index, mask=index < experts, other=0)
    starts = tl.load(ends + index - 1, mask=(index > 0) & (index < experts), other=0)
    tiles = tl.cumsum((stops - starts + ROWS - 1) // ROWS, axis=0)  # up to and with this expert
    expert = tl.sum((tiles <= tile).to(tl.int32), axis=0)
    if expert < experts:
        earlier = tl.max(tl.where(tiles <= tile, tiles, 0), axis=0)
        start = tl.sum(tl.where(index == expert, starts, 0), axis=0)
        stop = tl.sum(tl.where(index == expert, stops, 0), axis=0)
        row = (start + (tile - earlier) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < stop
        output = block * GROUP + tl.arange(0, GROUP)
        along = tl.arange(0, GROUP)
        left = rows + row[:, None] * inputs + along[None, :]
        right = weights + expert.to(tl.int64) * outputs * inputs + output[None, :] * inputs + along[:, None]
        left_scale = row_scales + row * groups
        right_scale = weight_scales + (expert * blocks + block) * groups
        total = tl.zeros((ROWS, GROUP), tl.float32)
        for group in range(groups):
            a = tl.load(left + group * GROUP, mask=inside[:, None], other=0).to(tl.float8e4nv, bitcast=True)
            b = tl.load(right + group * GROUP).to(tl.float8e4nv, bitcast=True)
            scale = tl.load(left_scale + group, mask=inside, other=0.0) * tl.load(right_scale + group)
            total += tl.dot(a, b) * scale[:, None]
        bits = round_to_bf16_bits(total).to(tl.int16)
        tl.store(out + row[:, None] * outputs + output[None, :], bits, mask=inside[:, None])


def matmul(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Activations e4m3 [M, K], scales [M, K / 128], by weights e4m3 [E, N, K], scales [E, N / 128, K / 128] -> bf16 [M, N].

    `ends` int32 [E]: the end of each expert's rows; the last is M.
    """
    (count, inputs), (experts, outputs, _) = q.shape, weight_q.shape
    out = torch.empty(count, outputs, dtype=torch.bfloat16, device=q.device)
    most = count // ROWS + experts  # tiles, however the rows are spread
    _grouped_kernel[(most * (outputs // GROUP),)](
        q.contiguous().view(torch.uint8), scale.contiguous(), weight_q.contiguous().view(torch.uint8), weight_scale.contiguous(),
        ends, out.view(torch.int16), experts, outputs, inputs,
        EXPERTS=triton.next_power_of_2(experts), ROWS=ROWS, GROUP=GROUP, num_stages=STAGES,
    )  # fmt: skip
    return out
