"""Fast INT4 and FP8 kernels that give the bits of the torch reference, and the choice between them.

`cpu.py` (numba) serves CPU tensors, `gpu.py` (Triton) CUDA tensors; the reference in `int4.py` everything else: INT8, widths
that are no multiple of 16, and weights too small to pay for a kernel's start. FP8 has kernels on a GPU (gpu_fp8.py). The result
never depends on the choice.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from functools import lru_cache
from typing import Any

import torch

from runner.config.schema import Convention
from runner.precision import int4
from runner.precision.checks import WeightError, as_bf16, check_scale
from runner.precision.kernels.threads import over_rows

# Importing numba and loading its cached kernels costs 0.4 to 1.5 s once per process, compiling them 4 to 8 s once per
# machine; eager torch handles a billion weights in that time. So the kernels are loaded after that many weights, or when
# `load` is called by a job that knows it has more (the converter, a benchmark). Once they are there, every weight of at
# least LOADED_ELEMENTS takes them.
FIRST_ELEMENTS = 1 << 30
LOADED_ELEMENTS = 1 << 14
# From these amax bits on the largest product overflows bf16 (or the weight is infinite or NaN): the reference raises.
_LIMITS = {Convention.exact: 0x7F80, Convention.kimi: 0x7F7F, Convention.llmcompressor: 0x7F70}
_INFINITE = 0x7F80
_CONVENTIONS = {Convention.exact: 0, Convention.kimi: 1, Convention.llmcompressor: 2}


class BadWeights(WeightError):
    """Some of the tensors that were quantized inside `checked_together` hold NaN, infinities or what overflows."""


_seen = {"elements": 0}  # weights that eager torch has handled in this process


def load() -> None:
    """Load the CPU kernels now (a kernel compiles at its first call on a machine): for jobs with many weights to come."""
    importlib.import_module("runner.precision.kernels.cpu")


def _loaded() -> bool:
    return "runner.precision.kernels.cpu" in sys.modules


@lru_cache(maxsize=1)
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _suits_cpu(weight: torch.Tensor, group_size: int) -> bool:
    width = weight.shape[-1] if group_size == -1 else group_size
    if weight.device.type != "cpu" or width % 16 or weight.shape[-1] % width:
        return False
    if weight.numel() < LOADED_ELEMENTS:
        return False
    if not _loaded():
        _seen["elements"] += weight.numel()
        if _seen["elements"] < FIRST_ELEMENTS:
            return False
        load()
    return True


def _suits_gpu(weight: torch.Tensor, group_size: int) -> bool:
    width = weight.shape[-1] if group_size == -1 else group_size
    power_of_two = width & (width - 1) == 0
    return weight.is_cuda and power_of_two and 16 <= width <= 4096 and weight.shape[-1] % width == 0 and _has("triton")


def checked_together() -> contextlib.AbstractContextManager[None]:
    """While it lasts, bad weights on a GPU are not raised one tensor at a time but at its end, as BadWeights, after one wait for
    the device."""
    if not torch.cuda.is_available() or not _has("triton"):
        return contextlib.nullcontext()
    from runner.precision.kernels import gpu

    return gpu.checked_together()


def for_fp8(tensor: torch.Tensor) -> Any:
    """The module of FP8 kernels (gpu_fp8.py) that a tensor's device has; None where eager torch serves it."""
    if not tensor.is_cuda or not _has("triton"):
        return None
    from runner.precision.kernels import gpu_fp8

    return gpu_fp8


def limit_of(convention: Convention, scale: torch.Tensor | None) -> int:
    """amax bits from which on a weight is refused; kept scales only refuse NaN and infinities."""
    return _LIMITS[convention] if scale is None else _INFINITE


def _blocks(rows: torch.Tensor, width: int) -> Any:
    """bf16 [rows, in], contiguous -> numpy uint16 [rows, groups, width / 16, 16] of the same memory."""
    return rows.view(torch.uint16).numpy().reshape(rows.shape[0], rows.shape[1] // width, width // 16, 16)


def _scales(kept: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """The kept scales, checked, or room for new ones; bf16, contiguous."""
    if kept is None:
        return torch.empty(shape, dtype=torch.bfloat16)
    check_scale(kept, shape)
    return kept.to(torch.bfloat16).contiguous()


def quantize_pack(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4: weight [..., out, in] -> (packed int32 [..., out, in / 8], scales bf16), as int4.pack(int4.quantize(...))."""
    if _suits_gpu(weight, group_size):
        from runner.precision.kernels import gpu

        return gpu.quantize_pack(weight, group_size, convention, scale, limit_of(convention, scale))
    if not _suits_cpu(weight, group_size):
        q, scale = int4.quantize(weight, group_size, convention, scale)
        return int4.pack(q), scale
    from runner.precision.kernels import cpu

    rows = as_bf16(weight).contiguous().flatten(0, -2)
    columns = rows.shape[1]
    width = columns if group_size == -1 else group_size
    kept = scale is not None
    scale = _scales(scale, (*weight.shape[:-1], columns // width))
    packed = torch.empty((*weight.shape[:-1], columns // 8), dtype=torch.int32)
    source, code = _blocks(rows, width), _CONVENTIONS[convention]
    limit = limit_of(convention, scale if kept else None)
    scale_bits = scale.flatten(0, -2).view(torch.uint16).numpy()
    packed_bits = packed.flatten(0, -2).view(torch.uint16).numpy()

    def part(start: int, stop: int) -> int:
        return cpu.quantize_pack_rows(
            source[start:stop], cpu.MIDPOINTS, code, kept, scale_bits[start:stop], packed_bits[start:stop]
        )

    if over_rows(part, rows.shape[0], columns) >= limit:
        int4.quantize(weight, group_size, convention, scale if kept else None)  # raises, with what is wrong
    return packed, scale


def quantize_dequantize_(
    weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """INT4, in place: weight [..., out, in] becomes its effective weight; returns the scales bf16 [..., out, groups].

    One read and one write per weight. Raises WeightError on NaN and infinities; rows before the first bad one may
    then hold effective weights already.
    """
    if _suits_gpu(weight, group_size) and weight.dtype is torch.bfloat16 and weight.is_contiguous():
        from runner.precision.kernels import gpu

        return gpu.quantize_dequantize_(weight, group_size, convention, scale, limit_of(convention, scale))
    if weight.dtype is not torch.bfloat16 or not _suits_cpu(weight, group_size):
        values, scale = int4.quantize_dequantize(weight, group_size, convention, scale)
        weight.detach().copy_(values)
        return scale
    if not weight.is_contiguous():
        if weight.dim() > 2:  # rows of a stack: each expert's are contiguous
            kept = [None] * len(weight) if scale is None else list(scale)
            return torch.stack([quantize_dequantize_(w, group_size, convention, s) for w, s in zip(weight, kept, strict=True)])
        values, scale = int4.quantize_dequantize(weight, group_size, convention, scale)
        weight.detach().copy_(values)
        return scale
    from runner.precision.kernels import cpu

    rows = weight.detach().flatten(0, -2)
    columns = rows.shape[1]
    width = columns if group_size == -1 else group_size
    kept_scale = scale is not None
    scale = _scales(scale, (*weight.shape[:-1], columns // width))
    target, code = _blocks(rows, width), _CONVENTIONS[convention]
    scale_bits = scale.flatten(0, -2).view(torch.uint16).numpy()

    limit = limit_of(convention, scale if kept_scale else None)

    def part(start: int, stop: int) -> int:
        return cpu.quantize_dequantize_rows(target[start:stop], cpu.MIDPOINTS, code, kept_scale, limit, scale_bits[start:stop])

    if over_rows(part, rows.shape[0], columns) >= limit:
        int4.quantize(weight, group_size, convention)  # the bad row is as it came in: raises, with what is wrong
    return scale


def unpack(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """int32 [..., in / 8] -> int8 [..., in], as int4.unpack."""
    if packed.is_cuda and in_features % 8 == 0 and packed.shape[-1] * 8 == in_features and _has("triton"):
        from runner.precision.kernels import gpu

        return gpu.unpack(packed)
    whole = in_features == packed.shape[-1] * 8 and packed.numel() * 8 >= LOADED_ELEMENTS
    if packed.device.type != "cpu" or not whole or not _loaded():
        return int4.unpack(packed, in_features)
    from runner.precision.kernels import cpu

    source = packed.contiguous().flatten(0, -2) if packed.dim() > 1 else packed.contiguous().unsqueeze(0)
    q = torch.empty((*packed.shape[:-1], in_features), dtype=torch.int8)
    words = source.view(torch.uint16).numpy()
    values = q.view(source.shape[0], in_features).view(torch.uint32).numpy()

    def part(start: int, stop: int) -> int:
        cpu.unpack_rows(words[start:stop], values[start:stop])
        return 0

    over_rows(part, source.shape[0], in_features)
    return q
