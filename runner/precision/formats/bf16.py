"""bf16: what is not quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from runner.config.schema import Convention
from runner.precision.formats import UNQUANTIZED, FormatSpec, Part, Shape
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch


class Bf16(FormatSpec):
    name = UNQUANTIZED
    bits = 16
    scale_dtype = "none"
    part_names = ("weight",)
    quantized = False
    strategies = ("none",)

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        return TensorFormat(self.name, 0, None, strategy)

    def check_shape(self, tensor_format: TensorFormat, name: str, shape: Shape) -> None:
        """Every shape."""

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        return (Part("weight", "bfloat16", shape),)

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        return list(parts) == ["weight"]


FORMAT = Bf16()
