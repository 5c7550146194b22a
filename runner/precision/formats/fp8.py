"""fp8: e4m3 values (W8A8), with an fp32 scale per 128 x 128 block, per row or per tensor. The numbers: ../fp8.py.

weight e4m3 [out, in]; blocks: weight_scale_inv fp32 [out / 128, in / 128], rounded up; channel: weight_scale fp32 [out, 1];
tensor: weight_scale fp32 [1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.formats import FLOATS, FormatSpec, Part, Readable, Scales, Scheme, Shape
from runner.precision.quantization_config import module_names
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch

BLOCK = 128


class Fp8(FormatSpec):
    name = "fp8"
    bits = 8
    scale_dtype = "float32"
    part_names = ("weight", "weight_scale", "weight_scale_inv")
    fixed_group = BLOCK
    strategies = ("block", "channel", "tensor")
    container = "float-quantized"
    methods = ("fp8",)

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        if strategy not in self.strategies:
            raise UserError(f"fp8 scales are per block, channel or tensor, not {strategy}")
        return TensorFormat(self.name, BLOCK if strategy == "block" else -1, None, strategy)

    def words(self, tensor_format: TensorFormat) -> list[str]:
        return [f"per {tensor_format.strategy}"]

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        suffix = "weight_scale_inv" if tensor_format.strategy == "block" else "weight_scale"
        return Part("weight", "float8_e4m3fn", shape), Part(suffix, "float32", scale_shape(shape, tensor_format.strategy))

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        values, scale = self.parts(tensor_format, shape)
        others: dict[str, tuple[Shape, ...]] = {"channel": (shape[:1],), "tensor": ((), (1, 1)), "block": ()}
        shapes = (scale.shape, *others[tensor_format.strategy])
        return (
            Readable((values.name,), (values.dtype,), (values.shape,)),
            Readable(("weight_scale", "weight_scale_inv"), (*FLOATS, "float8_e8m0fnu"), shapes),
        )

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        import torch

        return "weight" in parts and parts["weight"].dtype is torch.float8_e4m3fn

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        from runner.precision import fp8

        values, scale = fp8.quantize(weight, tensor_format.strategy, kept and kept.scale)
        return {"weight": values, "weight_scale_inv" if tensor_format.strategy == "block" else "weight_scale": scale}

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"]

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import fp8

        return fp8.dequantize(parts["weight"], scales.scale, tensor_format.strategy)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        from runner.precision import fp8

        values, scale = fp8.quantize_dequantize(weight, tensor_format.strategy, kept and kept.scale)
        return values, Scales(scale)

    def quantize_dequantize_(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> Scales:
        from runner.precision import kernels

        on_gpu = kernels.for_fp8(weight) if tensor_format.strategy == "block" else None
        if on_gpu is None or not on_gpu.suits_weight(weight):
            return super().quantize_dequantize_(weight, tensor_format, kept)
        return Scales(on_gpu.quantize_dequantize_(weight, kept and kept.scale))

    def quantization_config(self, tensor_format: TensorFormat, ignored: list[str]) -> dict[str, Any]:
        if tensor_format.strategy != "block":
            return super().quantization_config(tensor_format, ignored)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ignored,
        }

    def activations(self, tensor_format: TensorFormat) -> dict[str, Any] | None:
        strategy = "token" if tensor_format.strategy == "channel" else "tensor"
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": True, "observer": None}

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        if scheme.kind != "float" or scheme.bits != self.bits or scheme.strategy not in self.strategies:
            return None
        block = scheme.entry.get("block_structure")
        if scheme.strategy == "block" and block != [BLOCK, BLOCK]:
            raise UserError(f"quantization_config: block_structure is {block!r:.80}; readable is [{BLOCK}, {BLOCK}]")
        return TensorFormat.fp8(scheme.strategy)

    def config_reader(self, config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
        """Of DeepSeek-V3's and transformers' own `quant_method: fp8`."""
        block = config.get("weight_block_size")
        if block not in (None, [BLOCK, BLOCK]):
            raise UserError(f"quantization_config.weight_block_size is {block!r:.80}; readable is [{BLOCK}, {BLOCK}]")
        if config.get("fmt", "e4m3") != "e4m3":
            raise UserError(f"quantization_config.fmt is {config['fmt']!r:.80}; readable is 'e4m3'")
        grid = TensorFormat.fp8("block" if block else "tensor")
        entries = frozenset(entry.strip(".") for entry in module_names(config, "modules_to_not_convert"))

        def format_of(module: str) -> TensorFormat:
            # whole dotted components: `mlp.gate` must not swallow `mlp.gate_up_proj`
            parts = module.split(".")
            runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
            return TensorFormat.bf16() if any(run in entries for run in runs) else grid

        return format_of


def scale_shape(shape: Shape, strategy: str, block: int = BLOCK) -> Shape:
    """Shape of the scales of a weight [..., out, in]."""
    *leading, rows, columns = shape
    match strategy:
        case "block":
            return (*leading, -(-rows // block), -(-columns // block))
        case "channel":
            return (*leading, rows, 1)
        case "tensor":
            return (*leading, 1)
    raise ValueError(f"unknown fp8 strategy {strategy}")


FORMAT = Fp8()
