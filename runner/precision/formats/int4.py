"""int4: symmetric integers in groups (W4A16), as compressed-tensors' `pack-quantized` stores them. The numbers: ../int4.py.

weight_packed int32 [out, in / 8], weight_scale bf16 [out, groups], weight_shape int64 [2]

Read as well: what AutoAWQ and GPTQ programs write, with parts of their own (../packings.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from runner.config.schema import Convention
from runner.errors import UserError
from runner.precision.formats import FLOATS, FormatSpec, Part, Readable, Scales, Scheme, Shape
from runner.precision.quantization_config import module_names
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch


class Integer(FormatSpec):
    """What int4 and int8 share."""

    scale_dtype = "bfloat16"
    part_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    integer = True
    group_sizes = (-1, 16, 32, 64, 128, 256)
    container = "pack-quantized"
    conventions: ClassVar[tuple[Convention, ...]] = tuple(Convention)

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        if group_size not in self.group_sizes:
            raise UserError(
                f"group_size {group_size} is not one of {', '.join(map(str, self.group_sizes))}",
                key="precision.group_size",
                fix="precision.group_size=128",
            )
        return TensorFormat(self.name, group_size, convention, "channel" if group_size == -1 else "group")

    def words(self, tensor_format: TensorFormat) -> list[str]:
        return [
            f"group {tensor_format.group_size}" if tensor_format.group_size > 0 else "per channel",
            tensor_format.convention.name if tensor_format.convention else "unknown convention",
            *([] if tensor_format.symmetric else ["asymmetric"]),
            *([f"packed as {tensor_format.packing}"] if tensor_format.packing else []),
        ]

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = 1 if tensor_format.group_size == -1 else columns // max(tensor_format.group_size, 1)
        return (
            Part("weight_packed", "int32", (rows, self._words(columns))),
            Part("weight_scale", "bfloat16", (rows, groups)),
            Part("weight_shape", "int64", (2,)),
        )

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        packed, scale, numbers = self.parts(tensor_format, shape)
        per_row = ((shape[0],),) if tensor_format.strategy == "channel" else ()
        found = (
            Readable((packed.name,), (packed.dtype,), (packed.shape,)),
            Readable((scale.name,), FLOATS, (scale.shape, *per_row)),
            Readable((numbers.name,), ("int64", "int32"), (numbers.shape,)),
        )
        if tensor_format.symmetric:
            return found
        return *found, Readable(("weight_zero_point",), ("int32",), ((self._words(shape[0]), scale.shape[1]),))

    def _words(self, count: int) -> int:
        """int32 words that hold so many integers."""
        return -(-count * self.bits // 32)

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        import torch

        packed = parts.get("weight_packed")
        if packed is None or packed.dtype is not torch.int32 or "weight_shape" not in parts:
            return False
        return packed.shape[-1] == self._words(int(parts["weight_shape"][-1]))

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        import torch

        packed, scale = self._packed(weight, tensor_format.group_size, _convention(tensor_format), kept and kept.scale)
        return {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape, dtype=torch.int64)}

    def _packed(
        self, weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from runner.precision import int4

        integers, scale = int4.quantize(weight, group_size, convention, scale, self.bits)
        return int4.pack(integers, self.bits), scale

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from runner.precision import int4

        return int4.unpack(parts["weight_packed"], int(parts["weight_shape"][-1]), self.bits)

    def unpacked(self, body: torch.Tensor) -> torch.Tensor:
        from runner.precision import int4

        return int4.unpack(body, body.shape[-1] * 32 // self.bits, self.bits)

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import int4

        integers, zero_point = self.values(parts), None
        if not tensor_format.symmetric:
            zero_point = int4.unpack(parts["weight_zero_point"], integers.shape[0], self.bits, dim=-2)
        return int4.dequantize(integers, scales.scale, zero_point)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        from runner.precision import int4

        convention = _convention(tensor_format)
        values, scale = int4.quantize_dequantize(weight, tensor_format.group_size, convention, kept and kept.scale, self.bits)
        return values, Scales(scale)

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        if scheme.kind != "int" or scheme.bits != self.bits or scheme.container != self.container:
            return None
        if scheme.strategy not in ("group", "channel"):
            return None
        written = (scheme.entry.get("observer_kwargs") or {}).get("convention", "")
        dtype = scheme.entry.get("scale_dtype")
        return TensorFormat(
            self.name,
            -1 if scheme.strategy == "channel" else int(scheme.group),
            Convention.__members__.get(written),
            scheme.strategy,
            symmetric=scheme.entry.get("symmetric") is not False,
            scale_dtype=dtype.removeprefix("torch.") if dtype else "",
        )


def _convention(tensor_format: TensorFormat) -> Convention:
    assert tensor_format.convention is not None  # others can be read but not written
    return tensor_format.convention


class Int4(Integer):
    name = "int4"
    bits = 4
    proposed = ("int4_qat", 128)
    compiled_kernels = True
    part_names = (*Integer.part_names, "qweight", "qzeros", "scales", "g_idx")
    methods = ("awq", "gptq")

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        if not tensor_format.packing:
            return super().readable(tensor_format, shape)
        rows, columns = shape
        groups = 1 if tensor_format.group_size == -1 else columns // tensor_format.group_size
        awq = tensor_format.packing == "awq"
        packed = (columns, self._words(rows)) if awq else (self._words(columns), rows)
        found = (
            Readable(("qweight",), ("int32",), (packed,)),
            Readable(("qzeros",), ("int32",), ((groups, self._words(rows)),)),
            Readable(("scales",), FLOATS, ((groups, rows),)),
        )
        return found if awq else (*found, Readable(("g_idx",), ("int32", "int64"), ((columns,),)))

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import packings

        if not tensor_format.packing:
            return super().decode(parts, scales, tensor_format)
        return packings.dequantize(parts, tensor_format.packing)

    def config_reader(self, config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
        """Of `quant_method: awq` and `gptq`: linear modules but those with an entry of `modules_to_not_convert` in their name. A
        weight that such a program left alone lies there as it was, which `convert/stored.py` sees."""
        awq = config["quant_method"] == "awq"
        known: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "bits": (4, (4,)),
            "version": ("gemm", ("gemm", "GEMM")),
            "zero_point": (True, (True,)),
            "checkpoint_format": ("gptq", ("gptq", "gptq_v2")),
            "dynamic": (None, (None, {})),  # rules by module of GPTQModel
        }
        for key, (absent, readable) in known.items():
            if config.get(key, absent) not in readable:
                found = f"quantization_config.{key} is {config[key]!r:.80}; readable is {readable[0]!r}"
                raise UserError(found, fix="convert the original bf16 checkpoint instead")
        group = config["group_size"]
        if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != -1):
            raise UserError(f"quantization_config: group_size is {group!r:.80}; it must be a positive whole number, or -1")
        packing = "awq" if awq else config.get("checkpoint_format", "gptq")
        grid = TensorFormat("int4", group, None, "channel" if group == -1 else "group", symmetric=False, packing=packing)
        kept = module_names(config, "modules_to_not_convert")

        def format_of(module: str) -> TensorFormat:
            return TensorFormat.bf16() if any(entry in module for entry in kept) else grid

        return format_of

    def _packed(
        self, weight: torch.Tensor, group_size: int, convention: Convention, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from runner.precision import kernels

        return kernels.quantize_pack(weight, group_size, convention, scale)

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from runner.precision import kernels

        return kernels.unpack(parts["weight_packed"], int(parts["weight_shape"][-1]))

    def quantize_dequantize_(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> Scales:
        from runner.precision import kernels

        convention = _convention(tensor_format)
        return Scales(kernels.quantize_dequantize_(weight, tensor_format.group_size, convention, kept and kept.scale))


FORMAT = Int4()
