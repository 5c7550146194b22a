"""The one dispatch over formats: encode, decode and quantize-dequantize of any weight in any TensorFormat.

Trainer, converter, weight sync and engine call these four functions and nothing below them, so a weight has the same
integers and scales wherever it is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch

from runner.errors import UserError
from runner.precision import fp4, fp8, int4, kernels
from runner.precision.checks import WeightError
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.samples import ExportedTensor
from runner.schema import Convention, Format

__all__ = [
    "Scales",
    "TensorFormat",
    "decode",
    "encode",
    "encode_all",
    "fused_scales",
    "module_of",
    "quantize_dequantize",
    "quantize_dequantize_",
]

T = TypeVar("T")


class Scales(NamedTuple):
    """The scales of one weight, or of a stack of them, as stored beside the quantized values.

    scale          int4/int8 bf16 [..., out, groups]; fp8 fp32 (see fp8.py); mxfp4 uint8 e8m0; nvfp4 e4m3
    global_scale   nvfp4 only: fp32 [..., 1]
    """

    scale: torch.Tensor
    global_scale: torch.Tensor | None = None


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    if not name.endswith(".weight"):
        raise UserError(f"{name} is not the name of a weight: only tensors named *.weight are quantized")
    return name[: -len(".weight")]


def _named(name: str, function: Callable[..., T], *args: object) -> T:
    try:
        return function(*args)
    except WeightError as error:
        raise UserError(f"{name}: {error.problem}", fix=error.fix, key=error.key) from None


def _convention(tensor_format: TensorFormat, name: str) -> Convention:
    if tensor_format.convention is None or not tensor_format.symmetric:
        raise UserError(f"{name}: the format '{tensor_format}' can be read but not written")
    return tensor_format.convention


def fused_scales(weights: Mapping[str, torch.Tensor], tensor_format: TensorFormat) -> dict[str, Scales]:
    """Scales of the weights [..., out, in] that engines lay into one matrix (`PrecisionPlan.fused_with`), under one global scale.

    {} for formats without a global scale: their weights have the scales that they have alone. SGLang 0.5.23 keeps one global
    scale per matrix and refuses weight-only checkpoints whose weights disagree about it (read in its source).
    """
    if not tensor_format.has_global_scale:
        return {}
    amax = torch.stack([_named(name, fp4.nvfp4_amax, weight) for name, weight in weights.items()]).amax(0)
    shared = fp4.nvfp4_global_scale(amax)
    return {name: Scales(fp4.nvfp4_scales(weight, shared), shared.clone()) for name, weight in weights.items()}


def encode(name: str, weight: torch.Tensor, tensor_format: TensorFormat, scales: Scales | None = None) -> ExportedTensor:
    """One weight [out, in] in its on-disk form (see `runner.samples.ExportedTensor`).

    `scales`: kept scales of a weight that already holds dequantized values, as QAT leaves it; the integers are then
    those that QAT chose. Parts by format:
    int4, int8   <module>.weight_packed int32, .weight_scale bf16 [out, groups], .weight_shape int64 [2]
    fp8          <module>.weight e4m3; blocks: .weight_scale_inv fp32; channel and tensor: .weight_scale fp32
    mxfp4        <module>.weight_packed uint8 [out, in / 2], .weight_scale uint8 (e8m0)
    nvfp4        <module>.weight_packed uint8 [out, in / 2], .weight_scale e4m3, .weight_global_scale fp32 [1]
    Raises UserError naming the tensor on NaN, infinities and shapes that do not divide.
    """
    if not tensor_format.quantized:
        return ExportedTensor(name, Format.bf16.name, {name: weight.detach().to(torch.bfloat16)})
    tensor_format.check_shape(name, tuple(weight.shape))
    return ExportedTensor(name, tensor_format.format.name, _named(name, _encode_parts, name, weight, tensor_format, scales))


def encode_all(weights: Iterable[tuple[str, torch.Tensor]], plan: PrecisionPlan) -> Iterator[ExportedTensor]:
    """(on-disk name, tensor) pairs in the plan's formats, as they come; biases and the like keep their dtype.

    Weights that share a global scale wait for each other. UserError for names that the plan does not have, and for weights
    whose partners never come.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if not name.endswith(".weight"):
            yield ExportedTensor(name, Format.bf16.name, {name: weight})
            continue
        tensor_format = plan.format_of(name)
        waiting[name] = weight
        fused = plan.fused_with(name)
        if all(other in waiting for other in fused):
            together = {other: waiting.pop(other) for other in fused}
            scales = fused_scales(together, tensor_format)
            for other, tensor in together.items():
                yield encode(other, tensor, tensor_format, scales.get(other))
    if waiting:
        raise UserError(f"{', '.join(waiting)}: what shares a global scale with it is missing")


def _encode_parts(name: str, weight: torch.Tensor, tf: TensorFormat, scales: Scales | None) -> dict[str, torch.Tensor]:
    module = module_of(name)
    kept = scales.scale if scales else None
    match tf.format:
        case Format.int4 | Format.int8:
            if tf.format is Format.int4:
                packed, scale = kernels.quantize_pack(weight, tf.group_size, _convention(tf, name), kept)
            else:
                q, scale = int4.quantize(weight, tf.group_size, _convention(tf, name), kept, tf.bits)
                packed = int4.pack(q, tf.bits)
            shape = torch.tensor(weight.shape, dtype=torch.int64)
            return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, f"{module}.weight_shape": shape}
        case Format.fp8:
            values, scale = fp8.quantize(weight, tf.strategy, kept)
            suffix = "weight_scale_inv" if tf.strategy == "block" else "weight_scale"
            return {f"{module}.weight": values, f"{module}.{suffix}": scale}
        case Format.mxfp4:
            code, scale = fp4.quantize_mxfp4(weight, kept)
            return {f"{module}.weight_packed": fp4.pack(code), f"{module}.weight_scale": scale}
        case Format.nvfp4:
            code, scale, global_scale = fp4.quantize_nvfp4(weight, kept, scales.global_scale if scales else None)
            return {
                f"{module}.weight_packed": fp4.pack(code),
                f"{module}.weight_scale": scale,
                f"{module}.weight_global_scale": global_scale,
            }
    raise AssertionError(tf.format)


def integers(exported: ExportedTensor, tensor_format: TensorFormat) -> torch.Tensor:
    """The unpacked integers (int8), fp8 values or FP4 codes (uint8) [out, in] of a quantized tensor."""
    module = module_of(exported.name)
    match tensor_format.format:
        case Format.int4 | Format.int8:
            columns = int(exported.parts[f"{module}.weight_shape"][-1])
            packed = exported.parts[f"{module}.weight_packed"]
            return kernels.unpack(packed, columns) if tensor_format.bits == 4 else int4.unpack(packed, columns, 8)
        case Format.fp8:
            return exported.parts[f"{module}.weight"]
        case Format.mxfp4 | Format.nvfp4:
            return fp4.unpack(exported.parts[f"{module}.weight_packed"])
    raise UserError(f"{exported.name} is not quantized")


def scales_of(exported: ExportedTensor) -> Scales:
    """The stored scales of a quantized tensor."""
    module = module_of(exported.name)
    parts = exported.parts
    scale = parts.get(f"{module}.weight_scale_inv", parts.get(f"{module}.weight_scale"))
    if scale is None:
        raise UserError(f"{exported.name}: no weight_scale beside it")
    return Scales(scale, parts.get(f"{module}.weight_global_scale"))


def decode(exported: ExportedTensor, tensor_format: TensorFormat) -> torch.Tensor:
    """Effective bf16 weight [out, in] of an exported tensor; raises UserError naming a part that is missing."""
    if exported.format != tensor_format.format.name:
        raise UserError(f"{exported.name} arrived as {exported.format}, the plan says {tensor_format}")
    if not tensor_format.quantized:
        return exported.parts[exported.name].to(torch.bfloat16)
    try:
        return _named(exported.name, _decode, exported, tensor_format)
    except KeyError as error:
        raise UserError(f"{exported.name}: part {error} is missing") from None


def _decode(exported: ExportedTensor, tf: TensorFormat) -> torch.Tensor:
    q = integers(exported, tf)
    scales = _as_written_here(scales_of(exported), tf)
    match tf.format:
        case Format.int4 | Format.int8:
            zero_point = None
            if not tf.symmetric:
                packed = exported.parts[f"{module_of(exported.name)}.weight_zero_point"]
                zero_point = int4.unpack(packed, q.shape[0], tf.bits, dim=-2)
            return int4.dequantize(q, scales.scale, zero_point)
        case Format.fp8:
            return fp8.dequantize(q, scales.scale, tf.strategy)
        case Format.mxfp4:
            return fp4.dequantize_mxfp4(q, scales.scale)
        case _:
            assert scales.global_scale is not None
            return fp4.dequantize_nvfp4(q, scales.scale, scales.global_scale)


def _as_written_here(scales: Scales, tf: TensorFormat) -> Scales:
    """Other programs' scales of a matrix [out, in] in the dtype and shape of `encode`: e8m0 as such, one per row as [out]."""
    scale = scales.scale
    if scale.dtype is torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
        if tf.format is not Format.mxfp4:
            scale = fp4.e8m0_to_float(scale)
    if tf.strategy == "channel" and scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    if tf.strategy == "tensor" and scale.numel() == 1:
        scale = scale.reshape(1)
    return Scales(scale, scales.global_scale)


def quantize_dequantize(
    weight: torch.Tensor, tensor_format: TensorFormat, scales: Scales | None = None, name: str = "weight"
) -> tuple[torch.Tensor, Scales | None]:
    """(effective weight in bf16 [..., out, in], its scales; None for bf16), out of place.

    nvfp4 and per-tensor fp8 take one global scale per matrix of a stack [E, out, in], which for nvfp4 is what fused weights
    want; fp8 blocks start at row 0: pass a stack of fused weights piece by piece (`weight[:, start:stop]`) in fp8.
    """
    if not tensor_format.quantized:
        return weight.detach().to(torch.bfloat16), None
    tensor_format.check_shape(name, tuple(weight.shape))
    return _named(name, _quantize_dequantize, name, weight, tensor_format, scales)


def _quantize_dequantize(name: str, weight: torch.Tensor, tf: TensorFormat, scales: Scales | None) -> tuple[torch.Tensor, Scales]:
    kept = scales.scale if scales else None
    match tf.format:
        case Format.int4 | Format.int8:
            return _pair(int4.quantize_dequantize(weight, tf.group_size, _convention(tf, name), kept, tf.bits))
        case Format.fp8:
            return _pair(fp8.quantize_dequantize(weight, tf.strategy, kept))
        case Format.mxfp4:
            code, scale = fp4.quantize_mxfp4(weight, kept)
            return fp4.dequantize_mxfp4(code, scale), Scales(scale)
        case _:
            code, scale, global_scale = fp4.quantize_nvfp4(weight, kept, scales.global_scale if scales else None)
            return fp4.dequantize_nvfp4(code, scale, global_scale), Scales(scale, global_scale)


def _pair(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, Scales]:
    return result[0], Scales(result[1])


def quantize_dequantize_(
    weight: torch.Tensor, tensor_format: TensorFormat, name: str = "weight", scales: Scales | None = None
) -> Scales | None:
    """The QAT step: replace a weight (bf16, or fp32 without masters) by its effective values, in place.

    Returns the scales, to be kept for `encode`; None for bf16. `name` is for the error on NaN. The weight may be a view
    of a stack, as long as it may be written. `scales` given: those are used (`fused_scales`).
    """
    if tensor_format.format is Format.int4:
        tensor_format.check_shape(name, tuple(weight.shape))
        convention = _convention(tensor_format, name)
        kept = scales.scale if scales else None
        return Scales(_named(name, kernels.quantize_dequantize_, weight, tensor_format.group_size, convention, kept))
    values, scales = quantize_dequantize(weight, tensor_format, scales, name)
    with torch.no_grad():
        weight.copy_(values)
    return scales
