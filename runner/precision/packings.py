"""INT4 as AutoAWQ and GPTQ programs pack it: read, never written.

Both store the transposed weight, so their int32 words and scales run along `out`: qweight, qzeros [groups, out / 8] and scales
[groups, out] (fp16 or bf16). Integers and zero points are 0 .. 15, and a weight is (q - zero) * scale, rounded once, to bf16.

    AWQ      qweight [in, out / 8]: eight outputs a word, from its lowest bits 0, 2, 4, 6, 1, 3, 5, 7
    GPTQ     qweight [in / 8, out]: eight neighbours along `in`, in order; qzeros along `out`, in order, one less than the zero
             points; g_idx [in], the group of each input
    GPTQ v2  the same with the zero points themselves
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runner.precision.checks import WeightError

AWQ, GPTQ, GPTQ_V2 = "awq", "gptq", "gptq_v2"
PER_WORD = 8
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the integer of output 0, 1, ... lies


def dequantize(parts: Mapping[str, torch.Tensor], packing: str) -> torch.Tensor:
    """bf16 weight [out, in]. WeightError for a g_idx that names groups which are not there, KeyError for a missing part."""
    scales, places = parts["scales"], AWQ_PLACES if packing == AWQ else tuple(range(PER_WORD))
    zeros = _nibbles(parts["qzeros"], places).flatten(-2)
    if packing == AWQ:
        values = _nibbles(parts["qweight"], places).flatten(-2)
    else:
        values = _nibbles(parts["qweight"], places).transpose(1, 2).flatten(0, 1)
        zeros = (zeros + 1) & 15 if packing == GPTQ else zeros
    inputs, groups = values.shape[0], scales.shape[0]
    group = torch.arange(inputs) // (inputs // groups) if packing == AWQ else _checked(parts["g_idx"], groups)
    weight = (values - zeros[group]).float() * scales.float()[group]
    return weight.to(torch.bfloat16).t().contiguous()


def _nibbles(words: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """int32 [a, b] -> int32 [a, b, 8], 0 .. 15: those at these places of each word."""
    shifts = torch.tensor([4 * place for place in places], dtype=torch.int32, device=words.device)
    return (words.unsqueeze(-1) >> shifts) & 15


def _checked(g_idx: torch.Tensor, groups: int) -> torch.Tensor:
    if not ((g_idx >= 0) & (g_idx < groups)).all():
        raise WeightError(f"g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, there are {groups}")
    return g_idx.long()
