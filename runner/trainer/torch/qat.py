"""Quantization-aware training in the torch trainer: which weights of the model hold quantized values, and when.

In place (the default): after an optimizer step every quantized model weight becomes qdq(bf16(master)); the forward sees
plain weights, and the gradient at the quantized point goes to the master: the straight-through estimator (Bengio et al.,
arXiv 1308.3432) without an autograd node. In the forward: the model holds bf16(master) and every forward, recompute
included, quantizes through an autograd function. Both give the same bits in losses, gradients and masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from runner.config.schema import ModelConfig
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models.family import Family
from runner.precision import kernels
from runner.precision.codec import Scales, encode, fused_scales, module_of, quantize_dequantize, quantize_dequantize_
from runner.precision.formats import UNQUANTIZED
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat


@dataclass(frozen=True)
class Piece:
    """An on-disk weight inside a parameter: memory[expert, start:stop], or the whole parameter (expert None)."""

    name: str
    expert: int | None
    start: int
    stop: int

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        return memory if self.expert is None else memory[self.expert, self.start : self.stop]


class WeightLayout:
    """The on-disk weights in every in-memory tensor, with the formats of one side's plan."""

    def __init__(self, family: Family, model: ModelConfig, plan: PrecisionPlan, shapes: Mapping[str, torch.Size]) -> None:
        stacked = {parameter.name: parameter.pieces for parameter in family.stacked(model)}
        self.pieces: dict[str, list[Piece]] = {}
        self.formats: dict[str, TensorFormat] = {}
        self._fused: dict[str, tuple[str, ...]] = {}
        for name, shape in shapes.items():
            if name in stacked:
                self.pieces[name] = [Piece(*piece) for piece in stacked[name]]
            else:
                self.pieces[name] = [Piece(name, None, 0, shape[0] if len(shape) else 1)]
            formats = {plan.format_of(piece.name) for piece in self.pieces[name]}
            if len(formats) > 1:
                raise UserError(f"{name} holds weights of several formats: {', '.join(sorted(map(str, formats)))}")
            self.formats[name] = formats.pop()
            if name not in stacked:  # a stacked parameter is what engines fuse
                self._fused[name] = plan.fused_with(name)

    def unquantized(self) -> WeightLayout:
        """The same weights, all in bf16."""
        layout = object.__new__(WeightLayout)
        layout.pieces, layout.formats = self.pieces, dict.fromkeys(self.formats, TensorFormat.bf16())
        layout._fused = {}
        return layout

    def fused_scales(self, name: str, weight_of: Callable[[str], torch.Tensor]) -> dict[str, Scales]:
        """Scales of this tensor and of those that share a global scale with it; {} where it has none or is alone in it."""
        names = self._fused.get(name, ())
        return fused_scales({other: weight_of(other) for other in names}, self.formats[name]) if len(names) > 1 else {}

    @property
    def quantized(self) -> list[str]:
        return [name for name, tensor_format in self.formats.items() if tensor_format.quantized]

    def row_ranges(self, name: str) -> list[tuple[int, int]] | None:
        """Row ranges that must be quantized one by one because a scale spans rows; None: the whole tensor at once."""
        tensor_format, pieces = self.formats[name], self.pieces[name]
        by_row = tensor_format.strategy in ("group", "channel")
        if by_row or pieces[0].expert is None:
            return None
        return sorted({(piece.start, piece.stop) for piece in pieces})

    def parts(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[tuple[int, int] | None, torch.Tensor]]:
        """(row range, view) pairs that together are the tensor, each to be quantized at once."""
        ranges = self.row_ranges(name)
        if ranges is None:
            yield None, tensor
            return
        for start, stop in ranges:
            yield (start, stop), tensor[:, start:stop]


class WeightQuantizer:
    """Quantize-dequantize of the model's weights, with the scales kept beside."""

    def __init__(self, layout: WeightLayout) -> None:
        self.layout = layout
        self.scales: dict[tuple[str, tuple[int, int] | None], Scales] = {}
        self._quantized: dict[str, int] = {}  # the version of each weight when it was quantized in place

    def holds_effective(self, name: str, weight: torch.Tensor) -> bool:
        """Whether `weight` was last written by `quantize_`, so that it lies on the grid of the kept scales."""
        return self._quantized.get(name) == weight._version

    @torch.no_grad()
    def quantize_(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Quantize in place every weight that the plan quantizes; `weights` hold bf16(master). Keeps the scales."""
        try:
            with kernels.checked_together():
                self._quantize_each_(weights)
        except kernels.BadWeights:  # told for all tensors at once; bad groups are as they came in, so one of these says which
            for name in self.layout.quantized:
                for _, view in self.layout.parts(name, weights[name]):
                    quantize_dequantize(view, self.layout.formats[name], None, name)
            raise

    def _quantize_each_(self, weights: Mapping[str, torch.Tensor]) -> None:
        fused: dict[str, Scales] = {}
        for name in self.layout.quantized:
            if name not in fused:  # before the first of them changes
                fused |= self.layout.fused_scales(name, weights.__getitem__)
            for rows, view in self.layout.parts(name, weights[name]):
                scales = quantize_dequantize_(view, self.layout.formats[name], name, fused.pop(name, None))
                assert scales is not None
                self.scales[name, rows] = scales
            self._quantized[name] = weights[name]._version

    def effective(self, name: str, weight: torch.Tensor, weight_of: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """qdq(bf16(weight)) in the dtype of `weight`, out of place; `weight_of` finds those that share a global scale with it."""
        tensor_format = self.layout.formats[name]
        scales = self.layout.fused_scales(name, weight_of).get(name)
        parts = [quantize_dequantize(view, tensor_format, scales, name)[0] for _, view in self.layout.parts(name, weight)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """Forward: the effective weight. Backward: the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, effective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return effective(weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def straight_through(weight: torch.Tensor, effective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """effective(weight), whose gradient goes to `weight` as it is (Bengio et al., arXiv 1308.3432)."""
    result: torch.Tensor = _StraightThrough.apply(weight, effective)
    return result


class ForwardFakeQuantization:
    """Fake quantization in every forward: the fallback without masters, and the oracle for the in-place kind.

    While a module runs, the fake-quantized weight stands in its instance dict, where attribute look-up finds it before
    the parameter; a recomputed forward does the same again. `enabled=False` computes with the weights as they are.
    """

    def __init__(self, model: nn.Module, quantizer: WeightQuantizer) -> None:
        self.enabled = True
        self._parameter = model.get_parameter
        by_module: dict[str, list[str]] = {}
        for name in quantizer.layout.quantized:
            module, _, attribute = name.rpartition(".")
            by_module.setdefault(module, []).append(attribute)
        for module_name, attributes in by_module.items():
            self._wrap(model.get_submodule(module_name), module_name, attributes, quantizer)

    def _wrap(self, module: nn.Module, module_name: str, attributes: list[str], quantizer: WeightQuantizer) -> None:
        inner = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.enabled:
                return inner(*args, **kwargs)
            for attribute in attributes:
                name = f"{module_name}.{attribute}"
                effective = _StraightThrough.apply(
                    module._parameters[attribute],
                    lambda weight, name=name: quantizer.effective(name, weight, self._parameter),
                )
                module.__dict__[attribute] = effective
            try:
                return inner(*args, **kwargs)
            finally:
                for attribute in attributes:
                    del module.__dict__[attribute]

        module.forward = forward


def export_weights(
    layout: WeightLayout,
    weights: Mapping[str, torch.Tensor],
    kept: Callable[[str, tuple[int, int] | None], Scales | None],
) -> Iterator[ExportedTensor]:
    """Every on-disk weight in the layout's formats, from unquantized `weights` (bf16(master), in-memory names).

    `kept` gives the scales that QAT stored for a part of a tensor (None: the whole), so that the integers are those the
    trainer computes with. Stacks whose scales stay inside rows are encoded in one call and cut afterwards: one call
    per expert would cost more than the arithmetic on a small model.
    """
    for name, pieces in layout.pieces.items():
        tensor_format, weight = layout.formats[name], weights[name]
        if not tensor_format.quantized:
            for piece in pieces:
                yield ExportedTensor(piece.name, UNQUANTIZED, {piece.name: piece.of(weight).detach()})
        elif pieces[0].expert is None:
            scales = kept(name, None) or layout.fused_scales(name, weights.__getitem__).get(name)
            yield encode(pieces[0].name, weight, tensor_format, scales)
        elif layout.row_ranges(name) is None:
            stack = encode(f"{name}.weight", weight, tensor_format, kept(name, None))
            yield from (_cut(stack, name, piece) for piece in pieces)
        else:
            for piece in pieces:
                assert piece.expert is not None
                scales = kept(name, (piece.start, piece.stop))
                if scales is not None:
                    scales = Scales(scales.scale[piece.expert])
                yield encode(piece.name, piece.of(weight), tensor_format, scales)


def _cut(stack: ExportedTensor, name: str, piece: Piece) -> ExportedTensor:
    """The parts of one expert's rows out of an encoded stack [E, out, in]."""
    module, parts = module_of(piece.name), dict[str, torch.Tensor]()
    for part_name, part in stack.parts.items():
        suffix = part_name.removeprefix(f"{name}.")
        if suffix == "weight_shape":
            parts[f"{module}.{suffix}"] = torch.tensor([piece.stop - piece.start, int(part[-1])], dtype=torch.int64)
        elif suffix == "weight_global_scale":
            parts[f"{module}.{suffix}"] = part[piece.expert].clone()  # gate_proj and up_proj have the same
        else:
            parts[f"{module}.{suffix}"] = piece.of(part)
    return ExportedTensor(piece.name, stack.format, parts)
