"""mxfp4: e2m1 values (W4A16), a power-of-two scale per 32 weights. The numbers: ../fp4.py.

weight_packed uint8 [out, in / 2], weight_scale uint8 (e8m0) [out, in / 32]. A power of two moves no bit of a mantissa: every
product value * scale is exact in bf16, so that no way of rounding it can differ between trainer, converter and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.formats import FormatSpec, Part, Readable, Scales, Scheme, Shape
from runner.precision.quantization_config import module_names
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch

GROUP = 32
# modules_to_not_convert of gpt-oss's own config.json: all that is no routed expert
KEPT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class Fp4(FormatSpec):
    """What mxfp4 and nvfp4 share: two e2m1 codes in a byte, groups of a fixed size."""

    bits = 4
    fixed_group: ClassVar[int]

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        return TensorFormat(self.name, self.fixed_group, None, strategy)

    def check_shape(self, tensor_format: TensorFormat, name: str, shape: Shape) -> None:
        super().check_shape(tensor_format, name, shape)
        if shape[-1] % 2:
            raise UserError(f"{name}: in dimension {shape[-1]} is odd, two FP4 values share a byte")

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.unpacked(parts["weight_packed"])

    def unpacked(self, body: torch.Tensor) -> torch.Tensor:
        from runner.precision import fp4

        return fp4.unpack(body)

    @staticmethod
    def _packed(parts: Mapping[str, torch.Tensor]) -> bool:
        import torch

        return "weight_packed" in parts and parts["weight_packed"].dtype is torch.uint8


class Mxfp4(Fp4):
    name = "mxfp4"
    scale_dtype = "e8m0"
    part_names = ("weight_packed", "weight_scale")
    fixed_group = GROUP
    container = "mxfp4-pack-quantized"
    methods = ("mxfp4",)

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return Part("weight_packed", "uint8", (rows, columns // 2)), Part("weight_scale", "uint8", (rows, columns // GROUP))

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        packed, scale = super().readable(tensor_format, shape)
        return packed, scale._replace(dtypes=("uint8", "float8_e8m0fnu"))

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        return self._packed(parts) and "weight_global_scale" not in parts

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        from runner.precision import fp4

        code, scale = fp4.quantize_mxfp4(weight, kept and kept.scale)
        return {"weight_packed": fp4.pack(code), "weight_scale": scale}

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import fp4

        return fp4.dequantize_mxfp4(self.values(parts), scales.scale)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        from runner.precision import fp4

        code, scale = fp4.quantize_mxfp4(weight, kept and kept.scale)
        return fp4.dequantize_mxfp4(code, scale), Scales(scale)

    def stacked_config(self) -> dict[str, Any]:
        return {"quant_method": self.methods[0], "modules_to_not_convert": list(KEPT)}

    def config_reader(self, config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
        """Of gpt-oss's `quant_method: mxfp4`: all routed experts but those of modules that it names, `*` for any layer."""
        kept = module_names(config, "modules_to_not_convert")
        grid = TensorFormat.mxfp4()

        def format_of(module: str) -> TensorFormat:
            if ".experts." not in module or any(fnmatchcase(f"{module}.", f"{entry}.*") for entry in kept):
                return TensorFormat.bf16()
            return grid

        return format_of

    def scheme(self, tensor_format: TensorFormat) -> dict[str, Any]:
        return super().scheme(tensor_format) | {"scale_dtype": "torch.uint8"}

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        found = (scheme.kind, scheme.bits, scheme.strategy, scheme.group) == ("float", self.bits, "group", GROUP)
        return TensorFormat.mxfp4() if found else None


FORMAT = Mxfp4()
