"""How one weight tensor is quantized: the value that plan, trainer, converter and engine pass around. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from runner.config.schema import Convention, GridConfig
from runner.precision import formats


@dataclass(frozen=True)
class TensorFormat:
    """Format and grid of one weight [..., out, in]. What a format has of its own, its file in formats/ says.

    format       how values are stored: the name of a FormatSpec
    group_size   weights along `in` that share a scale; -1: a whole row. fp8 blocks: 128. bf16: 0
    convention   how an integer scale is derived from a group's amax; None for the other formats, and for a
                 foreign checkpoint that does not say
    strategy     group, channel, block (fp8, 128 x 128) or tensor: what shares one scale; "none" for bf16
    symmetric    False only for foreign INT checkpoints with zero points, which can be read but not written
    scale_dtype  of the stored scales; derived from the format unless a foreign checkpoint says otherwise
    packing      of foreign INT4 checkpoints that another program packed in its own way (packings.py); they can be read only
    """

    format: str
    group_size: int
    convention: Convention | None
    strategy: str
    symmetric: bool = True
    scale_dtype: str = ""
    packing: str = ""

    def __post_init__(self) -> None:
        if not self.scale_dtype:
            object.__setattr__(self, "scale_dtype", self.spec.scale_dtype)

    @staticmethod
    def named(name: str, group_size: int = -1, convention: Convention | None = None, strategy: str | None = None) -> TensorFormat:
        """The format of this name on a grid, of which it reads what it does not fix; UserError where there is none."""
        spec = formats.spec_of(name)
        return spec.grid(group_size, convention, strategy or spec.strategies[0])

    @staticmethod
    def of(grid: GridConfig) -> TensorFormat:
        """The format that one side of `precision` (train or rollout) asks for."""
        return TensorFormat.named(grid.format, grid.group_size, grid.convention)

    # shorter, for the formats that ship with the program

    @staticmethod
    def bf16() -> TensorFormat:
        return TensorFormat.named(formats.UNQUANTIZED)

    @staticmethod
    def int4(group_size: int, convention: Convention) -> TensorFormat:
        return TensorFormat.named("int4", group_size, convention)

    @staticmethod
    def int8(group_size: int, convention: Convention) -> TensorFormat:
        return TensorFormat.named("int8", group_size, convention)

    @staticmethod
    def fp8(strategy: str = "block") -> TensorFormat:
        return TensorFormat.named("fp8", strategy=strategy)

    @staticmethod
    def mxfp4() -> TensorFormat:
        return TensorFormat.named("mxfp4")

    @staticmethod
    def nvfp4() -> TensorFormat:
        return TensorFormat.named("nvfp4")

    @property
    def spec(self) -> formats.FormatSpec:
        return formats.spec_of(self.format)

    @property
    def quantized(self) -> bool:
        return self.spec.quantized

    @property
    def integer(self) -> bool:
        """Whether values are integers, each times its group's scale."""
        return self.spec.integer

    @property
    def has_global_scale(self) -> bool:
        """Whether one more scale covers the whole weight, or all the weights that engines lay into one matrix."""
        return self.spec.has_global_scale

    @property
    def scales_whole_weight(self) -> bool:
        """Whether a scale depends on every row, so that no part of the weight can be quantized by itself."""
        return self.has_global_scale or self.strategy == "tensor"

    @property
    def rows_per_scale(self) -> int:
        """Neighbouring rows that share a scale, beside a scale of the whole weight."""
        return self.group_size if self.strategy == "block" else 1

    @property
    def bits(self) -> int:
        return self.spec.bits

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError if a weight of this shape [..., out, in] has no such format."""
        self.spec.check_shape(self, name, shape)

    def parts(self, shape: tuple[int, ...]) -> tuple[formats.Part, ...]:
        """The stored tensors of a weight [out, in]."""
        return self.spec.parts(self, shape)

    def stored_bytes(self, shape: tuple[int, ...], base_bytes: int = 2) -> int:
        """Bytes of one stored weight, scales included; `base_bytes` for each value of one that is not quantized."""
        if not self.quantized:
            return prod(shape) * base_bytes
        return sum(part.num_bytes for part in self.parts(shape))

    def __str__(self) -> str:
        words = [self.format, *self.spec.words(self)]
        if self.scale_dtype != self.spec.scale_dtype:
            words.append(f"{self.scale_dtype} scales")
        return " ".join(words)
