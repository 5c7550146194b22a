"""The precision formats: one file of this folder each, which says everything that tells its format from the others.

`spec_of(name)` finds one. A file ends in `FORMAT = <a FormatSpec>`; a format that lies elsewhere is added with `register`.
Importing this package imports no torch, so that rules and the planner count bytes with it: methods that compute import what
they compute with.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from runner.config.schema import Config, Convention
from runner.errors import UserError

if TYPE_CHECKING:
    import torch

    from runner.models.family import Parameter
    from runner.precision.tensor_format import TensorFormat

Shape = tuple[int, ...]
_ITEM_BYTES = {"int64": 8, "int32": 4, "float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1, "float8_e4m3fn": 1}
UNQUANTIZED = "bf16"  # the format of what is not quantized
FLOATS = ("bfloat16", "float16", "float32")  # what weights that are not quantized, and foreign scales, are stored in


class Scales(NamedTuple):
    """The scales of one weight, or of a stack of them, as stored beside the quantized values.

    scale          int4/int8 bf16 [..., out, groups]; fp8 fp32 (see fp8.py); mxfp4 uint8 e8m0; nvfp4 e4m3
    global_scale   nvfp4 only: fp32 [..., 1]
    """

    scale: torch.Tensor
    global_scale: torch.Tensor | None = None


class Part(NamedTuple):
    """One stored tensor of a weight: what follows `<module>.`, torch's name of its dtype, its shape."""

    name: str  # "weight_packed"
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


class Readable(NamedTuple):
    """One stored tensor as this program and others write it: any of these names, dtypes and shapes."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Scheme:
    """A compressed-tensors `weights` entry, with the strategy that it means where it names none."""

    kind: str  # "int" or "float"
    bits: Any
    strategy: str
    group: Any
    container: str | None  # "pack-quantized", ...
    entry: Mapping[str, Any]


class FormatSpec(ABC):
    """One precision format. A `TensorFormat` is a format with its grid; weights are [..., out, in].

    Parts are named without their module: `weight_packed`. Scales lie in `weight_scale` or `weight_scale_inv`.
    """

    name: ClassVar[str]
    bits: ClassVar[int]  # of one stored value
    scale_dtype: ClassVar[str]
    part_names: ClassVar[tuple[str, ...]]  # of every part that a stored weight may have
    quantized: ClassVar[bool] = True
    integer: ClassVar[bool] = False  # values are integers, each times its group's scale; scales follow a convention
    has_global_scale: ClassVar[bool] = False  # over the whole weight, or all weights that engines lay into one matrix
    converter_only: ClassVar[bool] = False  # neither trained nor rolled out
    quantizes_activations: ClassVar[bool] = False  # training in it multiplies quantized activations, too
    proposed: ClassVar[tuple[str, int] | None] = None  # the option of `precision`, and its group size, to save memory with
    compiled_kernels: ClassVar[bool] = False  # worth loading for a large conversion
    group_sizes: ClassVar[tuple[int, ...]] = ()  # to choose from; () where the format fixes it
    fixed_group: ClassVar[int | None] = None  # weights along `in` that share a scale, by definition
    strategies: ClassVar[tuple[str, ...]] = ("group",)  # what shares a scale; the first unless another is asked for
    container: ClassVar[str | None] = None  # compressed-tensors' name of it
    methods: ClassVar[tuple[str, ...]] = ()  # values of quantization_config.quant_method that `config_reader` reads
    expert_note: ClassVar[str] = ""  # what a user should hear whose routed experts are written in it

    # -- the grid

    @abstractmethod
    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        """The format on a grid; what it fixes itself is not read. UserError for a grid that does not exist."""

    @property
    def variants(self) -> dict[str, str]:
        """Names under which a conversion asks for it -> strategy: `fp8`, `fp8_block`, `fp8_channel`, `fp8_tensor`."""
        more = {f"{self.name}_{strategy}": strategy for strategy in self.strategies} if len(self.strategies) > 1 else {}
        return {self.name: self.strategies[0], **more}

    @property
    def block_rows(self) -> int:
        """Neighbouring rows that share a scale, on the grid that a run has it on."""
        return self.fixed_group or 1 if self.strategies[0] == "block" else 1

    def check_shape(self, tensor_format: TensorFormat, name: str, shape: Shape) -> None:
        """Raise UserError if a weight of this shape has no such format."""
        if len(shape) < 2:
            raise UserError(f"{name} has shape {tuple(shape)}: only matrices [out, in] are quantized")
        if tensor_format.strategy == "group" and shape[-1] % tensor_format.group_size:
            raise UserError(
                f"{name}: in dimension {shape[-1]} is not a multiple of group_size {tensor_format.group_size}",
                key="precision.group_size",
                fix="choose a group_size that divides it, or leave this role out of precision.roles",
            )

    def words(self, tensor_format: TensorFormat) -> list[str]:
        """What a reader of its grid wants to know beside its name."""
        return []

    def rules(self, cfg: Config, weights: Sequence[Parameter]) -> Iterator[UserError]:
        """What the keys of `precision` that are its own need, whatever format is chosen. `weights`: a matrix of each role and
        shape that is quantized; none where that cannot be said."""
        return iter(())

    # -- the layout

    @abstractmethod
    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        """What `encode` makes of a weight [out, in]."""

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        """The parts of a weight [out, in] as this program and others write them."""
        return tuple(Readable((part.name,), (part.dtype,), (part.shape,)) for part in self.parts(tensor_format, shape))

    @abstractmethod
    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        """Whether stored parts are in this format, by their names and dtypes."""

    # -- the numbers of a quantized format. They raise checks.WeightError on NaN, infinities and kept scales of another grid

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        """Part name -> tensor of a weight [..., out, in], with the scales that QAT kept or with its own."""
        raise NotImplementedError(self.name)

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The unpacked integers (int8), fp8 values or FP4 codes (uint8) [..., out, in]."""
        raise NotImplementedError(self.name)

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        """Effective bf16 weight [..., out, in]; KeyError for a part that is missing."""
        raise NotImplementedError(self.name)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        """(effective weight in bf16, its scales), out of place."""
        raise NotImplementedError(self.name)

    def quantize_dequantize_(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> Scales:
        """The same in place; returns the scales."""
        import torch

        values, scales = self.quantize_dequantize(weight, tensor_format, kept)
        with torch.no_grad():
            weight.copy_(values)
        return scales

    def unpacked(self, body: torch.Tensor) -> torch.Tensor:
        """The values in a `weight_packed`, whatever its weight's width: for comparing them one by one."""
        raise NotImplementedError(self.name)

    def shared_scales(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Scales]:
        """Scales of weights under one global scale; a WeightError names the weight. Only with `has_global_scale`."""
        raise NotImplementedError(self.name)

    # -- config.json

    def quantization_config(self, tensor_format: TensorFormat, ignored: list[str]) -> dict[str, Any]:
        """`quantization_config` of a checkpoint in which all but the `ignored` linear modules are in this format."""
        scheme = {
            "targets": ["Linear"],
            "weights": self.scheme(tensor_format),
            "input_activations": self.activations(tensor_format),
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.container,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ignored,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def stacked_config(self) -> dict[str, Any] | None:
        """`quantization_config` of a checkpoint whose routed experts, in stacks (runner/models/stacks.py), are in this format and
        nothing else; None: it has no such form."""
        return None

    def scheme(self, tensor_format: TensorFormat) -> dict[str, Any]:
        """`weights` of a compressed-tensors scheme. `observer_kwargs` carries the convention; every reader accepts it."""
        convention = tensor_format.convention
        return {
            "num_bits": self.bits,
            "type": "int" if self.integer else "float",
            "symmetric": tensor_format.symmetric,
            "strategy": tensor_format.strategy,
            "group_size": tensor_format.group_size if tensor_format.strategy == "group" else None,
            "block_structure": None,
            "dynamic": False,
            "actorder": None,
            "scale_dtype": None,
            "observer": "minmax",
            "observer_kwargs": {"convention": convention.name} if convention else {},
        }

    def activations(self, tensor_format: TensorFormat) -> dict[str, Any] | None:
        """`input_activations` of a compressed-tensors scheme."""
        return None

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        """The grid of somebody's compressed-tensors entry; None for one that is not in this format."""
        return None

    def config_reader(self, config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
        """Module name -> grid, of a quantization_config with one of `methods`."""
        raise NotImplementedError(self.name)


_registered: dict[str, FormatSpec] = {}


def register(spec: FormatSpec) -> None:
    """Make a format known by its name."""
    _registered[spec.name] = spec


@cache
def _register_own() -> None:
    for module in pkgutil.iter_modules(__path__):
        register(importlib.import_module(f"{__name__}.{module.name}").FORMAT)


def all_formats() -> list[FormatSpec]:
    """Every format, by name."""
    _register_own()
    return [_registered[name] for name in sorted(_registered)]


def names() -> tuple[str, ...]:
    return tuple(spec.name for spec in all_formats())


def spec_of(name: str) -> FormatSpec:
    """The format of this name; UserError where there is none."""
    _register_own()
    if name not in _registered:
        close = difflib.get_close_matches(name, _registered, n=1)
        fix = f"did you mean {close[0]}?" if close else f"one of: {', '.join(sorted(_registered))}"
        raise UserError(f"{name!r:.80} is no precision format", key="precision", fix=fix)
    return _registered[name]


def part_names() -> tuple[str, ...]:
    """Of every format: what may follow the module in the name of a stored tensor of a weight."""
    return tuple(dict.fromkeys(name for spec in all_formats() for name in spec.part_names))
