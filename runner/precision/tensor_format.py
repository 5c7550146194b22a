"""How one weight tensor is quantized: the value that plan, trainer, converter and engine pass around. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from runner.errors import UserError
from runner.schema import Convention, Format, GridConfig

FP8_BLOCK = 128
MXFP4_GROUP = 32
NVFP4_GROUP = 16
INT_GROUP_SIZES = (-1, 16, 32, 64, 128, 256)

_SCALE_DTYPES = {
    Format.bf16: "none",
    Format.int4: "bfloat16",
    Format.int8: "bfloat16",
    Format.fp8: "float32",
    Format.mxfp4: "e8m0",
    Format.nvfp4: "float8_e4m3fn",
}


@dataclass(frozen=True)
class TensorFormat:
    """Format and grid of one weight [..., out, in].

    format       how values are stored
    group_size   weights along `in` that share a scale; -1: a whole row. fp8 blocks: 128. bf16: 0
    convention   how an integer scale is derived from a group's amax; None for the other formats, and for a
                 foreign checkpoint that does not say
    strategy     group, channel, block (fp8, 128 x 128) or tensor: what shares one scale; "none" for bf16
    symmetric    False only for foreign INT checkpoints with zero points, which can be read but not written
    scale_dtype  of the stored scales; derived from the format unless a foreign checkpoint says otherwise
    """

    format: Format
    group_size: int
    convention: Convention | None
    strategy: str
    symmetric: bool = True
    scale_dtype: str = ""

    def __post_init__(self) -> None:
        if not self.scale_dtype:
            object.__setattr__(self, "scale_dtype", _SCALE_DTYPES[self.format])

    @staticmethod
    def bf16() -> TensorFormat:
        return TensorFormat(Format.bf16, 0, None, "none")

    @staticmethod
    def integer(bits: int, group_size: int, convention: Convention) -> TensorFormat:
        """INT4 or INT8; raises UserError for a grid that does not exist."""
        if group_size not in INT_GROUP_SIZES:
            raise UserError(
                f"group_size {group_size} is not one of {', '.join(map(str, INT_GROUP_SIZES))}",
                key="precision.group_size",
                fix="precision.group_size=128",
            )
        if bits == 8 and convention is Convention.exact:
            raise UserError(
                "convention exact does not exist for int8: 7-bit integers leave one bit for the scale",
                key="precision.convention",
                fix="precision.convention=llmcompressor",
            )
        strategy = "channel" if group_size == -1 else "group"
        return TensorFormat(Format.int4 if bits == 4 else Format.int8, group_size, convention, strategy)

    @staticmethod
    def int4(group_size: int, convention: Convention) -> TensorFormat:
        return TensorFormat.integer(4, group_size, convention)

    @staticmethod
    def int8(group_size: int, convention: Convention) -> TensorFormat:
        return TensorFormat.integer(8, group_size, convention)

    @staticmethod
    def fp8(strategy: str = "block") -> TensorFormat:
        if strategy not in ("block", "channel", "tensor"):
            raise UserError(f"fp8 scales are per block, channel or tensor, not {strategy}")
        return TensorFormat(Format.fp8, FP8_BLOCK if strategy == "block" else -1, None, strategy)

    @staticmethod
    def mxfp4() -> TensorFormat:
        return TensorFormat(Format.mxfp4, MXFP4_GROUP, None, "group")

    @staticmethod
    def nvfp4() -> TensorFormat:
        return TensorFormat(Format.nvfp4, NVFP4_GROUP, None, "group")

    @staticmethod
    def of(grid: GridConfig) -> TensorFormat:
        """The format that one side of `precision` (train or rollout) asks for."""
        match grid.format:
            case Format.bf16:
                return TensorFormat.bf16()
            case Format.int4:
                return TensorFormat.int4(grid.group_size, grid.convention)
            case Format.int8:
                return TensorFormat.int8(grid.group_size, grid.convention)
            case Format.fp8:
                return TensorFormat.fp8()
            case Format.mxfp4:
                return TensorFormat.mxfp4()
            case Format.nvfp4:
                return TensorFormat.nvfp4()

    @property
    def quantized(self) -> bool:
        return self.format is not Format.bf16

    @property
    def has_global_scale(self) -> bool:
        """Whether one more scale covers the whole weight, or all the weights that engines lay into one matrix."""
        return self.format is Format.nvfp4

    @property
    def bits(self) -> int:
        return {Format.bf16: 16, Format.int8: 8, Format.fp8: 8}.get(self.format, 4)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError if a weight of this shape [..., out, in] has no such format."""
        if not self.quantized:
            return
        if len(shape) < 2:
            raise UserError(f"{name} has shape {tuple(shape)}: only matrices [out, in] are quantized")
        if self.strategy == "group" and shape[-1] % self.group_size:
            raise UserError(
                f"{name}: in dimension {shape[-1]} is not a multiple of group_size {self.group_size}",
                key="precision.group_size",
                fix="choose a group_size that divides it, or leave this role out of precision.roles",
            )
        if self.format in (Format.mxfp4, Format.nvfp4) and shape[-1] % 2:
            raise UserError(f"{name}: in dimension {shape[-1]} is odd, two FP4 values share a byte")

    def __str__(self) -> str:
        parts = [self.format.name]
        if self.format in (Format.int4, Format.int8):
            parts.append(f"group {self.group_size}" if self.group_size > 0 else "per channel")
            parts.append(self.convention.name if self.convention else "unknown convention")
            if not self.symmetric:
                parts.append("asymmetric")
        elif self.format is Format.fp8:
            parts.append(f"per {self.strategy}")
        if self.scale_dtype != _SCALE_DTYPES[self.format]:
            parts.append(f"{self.scale_dtype} scales")
        return " ".join(parts)
