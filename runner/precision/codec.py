"""Encode, decode and quantize-dequantize any weight in any TensorFormat, whose own file (formats/) does the work.

Trainer, converter, weight sync and engine call these functions and nothing below them, so a weight has the same
integers and scales wherever it is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from runner.data import ExportedTensor
from runner.errors import UserError
from runner.precision import fp4
from runner.precision.checks import named
from runner.precision.formats import Scales
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat

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

UNQUANTIZED = "bf16"


def module_of(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj`."""
    if not name.endswith(".weight"):
        raise UserError(f"{name} is not the name of a weight: only tensors named *.weight are quantized")
    return name[: -len(".weight")]


def _check(name: str, weight: torch.Tensor, tensor_format: TensorFormat) -> None:
    """UserError for a weight without this format, and for a format that only foreign checkpoints have."""
    tensor_format.check_shape(name, tuple(weight.shape))
    if not tensor_format.symmetric or (tensor_format.integer and tensor_format.convention is None):
        raise UserError(f"{name}: the format '{tensor_format}' can be read but not written")


def fused_scales(weights: Mapping[str, torch.Tensor], tensor_format: TensorFormat) -> dict[str, Scales]:
    """Scales of the weights [..., out, in] that engines lay into one matrix (`PrecisionPlan.fused_with`), under one global scale.

    {} for formats without a global scale: their weights have the scales that they have alone.
    """
    return tensor_format.spec.shared_scales(weights) if tensor_format.has_global_scale else {}


def encode(name: str, weight: torch.Tensor, tensor_format: TensorFormat, scales: Scales | None = None) -> ExportedTensor:
    """One weight [out, in] in its on-disk form (see `runner.data.ExportedTensor`).

    `scales`: kept scales of a weight that already holds dequantized values, as QAT leaves it; the integers are then
    those that QAT chose. The format's file lists its parts. Raises UserError naming the tensor on NaN, infinities and shapes
    that do not divide.
    """
    if not tensor_format.quantized:
        return ExportedTensor(name, UNQUANTIZED, {name: weight.detach().to(torch.bfloat16)})
    _check(name, weight, tensor_format)
    parts = named(name, tensor_format.spec.encode, weight, tensor_format, scales)
    module = module_of(name)
    return ExportedTensor(name, tensor_format.format, {f"{module}.{part}": tensor for part, tensor in parts.items()})


def encode_all(weights: Iterable[tuple[str, torch.Tensor]], plan: PrecisionPlan) -> Iterator[ExportedTensor]:
    """(on-disk name, tensor) pairs in the plan's formats, as they come; biases and the like keep their dtype.

    Weights that share a global scale wait for each other. UserError for names that the plan does not have, and for weights
    whose partners never come.
    """
    waiting: dict[str, torch.Tensor] = {}
    for name, weight in weights:
        if not name.endswith(".weight"):
            yield ExportedTensor(name, UNQUANTIZED, {name: weight})
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


def _parts(exported: ExportedTensor) -> dict[str, torch.Tensor]:
    """The parts by what follows their module."""
    module = module_of(exported.name)
    return {part.removeprefix(f"{module}."): tensor for part, tensor in exported.parts.items()}


def integers(exported: ExportedTensor, tensor_format: TensorFormat) -> torch.Tensor:
    """The unpacked integers (int8), fp8 values or FP4 codes (uint8) [out, in] of a quantized tensor."""
    if not tensor_format.quantized:
        raise UserError(f"{exported.name} is not quantized")
    return tensor_format.spec.values(_parts(exported))


def scales_of(exported: ExportedTensor) -> Scales:
    """The stored scales of a quantized tensor."""
    module = module_of(exported.name)
    parts = exported.parts
    found = (parts.get(f"{module}.{name}") for name in ("weight_scale_inv", "weight_scale", "scales"))
    scale = next((scale for scale in found if scale is not None), None)
    if scale is None:
        raise UserError(f"{exported.name}: no weight_scale beside it")
    return Scales(scale, parts.get(f"{module}.weight_global_scale"))


def decode(exported: ExportedTensor, tensor_format: TensorFormat) -> torch.Tensor:
    """Effective bf16 weight [out, in] of an exported tensor; raises UserError naming a part that is missing."""
    if exported.format != tensor_format.format:
        raise UserError(f"{exported.name} arrived as {exported.format}, the plan says {tensor_format}")
    if not tensor_format.quantized:
        return exported.parts[exported.name].to(torch.bfloat16)
    try:
        scales = _as_written_here(scales_of(exported), tensor_format)
        return named(exported.name, tensor_format.spec.decode, _parts(exported), scales, tensor_format)
    except KeyError as error:
        raise UserError(f"{exported.name}: part '{module_of(exported.name)}.{error.args[0]}' is missing") from None


def _as_written_here(scales: Scales, tf: TensorFormat) -> Scales:
    """Other programs' scales of a matrix [out, in] in the dtype and shape of `encode`: e8m0 as such, one per row as [out]."""
    scale = scales.scale
    if scale.dtype is torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
        if tf.scale_dtype != "e8m0":
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
    _check(name, weight, tensor_format)
    return named(name, tensor_format.spec.quantize_dequantize, weight, tensor_format, scales)


def quantize_dequantize_(
    weight: torch.Tensor, tensor_format: TensorFormat, name: str = "weight", scales: Scales | None = None
) -> Scales | None:
    """The QAT step: replace a weight (bf16, or fp32 without masters) by its effective values, in place.

    Returns the scales, to be kept for `encode`; None for bf16. `name` is for the error on NaN. The weight may be a view
    of a stack, as long as it may be written. `scales` given: those are used (`fused_scales`).
    """
    if not tensor_format.quantized:
        with torch.no_grad():
            weight.copy_(weight.detach().to(torch.bfloat16))
        return None
    _check(name, weight, tensor_format)
    return named(name, tensor_format.spec.quantize_dequantize_, weight, tensor_format, scales)
