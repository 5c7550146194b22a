"""Which weight is stored in which format: the single source for trainer, converter, weight sync and engine config.

Decided by ROLE from the model family's table, never by a name pattern. Torch-free: rules and the planner read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import regex

from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.models.family import Parameter
from runner.precision.tensor_format import FP8_BLOCK, MXFP4_GROUP, NVFP4_GROUP, TensorFormat
from runner.schema import Convention, Format, GridConfig, ModelConfig, PrecisionConfig, Role

Side = Literal["train", "rollout"]

# a quantized router gave gibberish; the others are few and sensitive, or glue whose matrices engines keep in bf16
NEVER_QUANTIZED = (Role.router, Role.norm, Role.embedding, Role.lm_head, Role.mtp, Role.vision)
_CT_FORMATS = {
    Format.int4: "pack-quantized",
    Format.int8: "pack-quantized",
    Format.fp8: "float-quantized",
    Format.mxfp4: "mxfp4-pack-quantized",
    Format.nvfp4: "nvfp4-pack-quantized",
}
_CT_SCALE_DTYPES = {Format.mxfp4: "torch.uint8", Format.nvfp4: "torch.float8_e4m3fn"}
_FP4 = {("group", MXFP4_GROUP): TensorFormat.mxfp4(), ("tensor_group", NVFP4_GROUP): TensorFormat.nvfp4()}
_SHOWN = 3  # names listed per difference
MATCH_SECONDS = 20.0  # of one list of patterns on all modules; Kimi-K2's 70,000 take 0.1
_PATTERN_FIX = "write the module names out, or use plain patterns like re:.*lm_head"


def quantized_roles(model: ModelConfig, precision: PrecisionConfig) -> frozenset[Role]:
    """Roles that `precision` quantizes on this model; raises UserError for roles that never may be.

    precision.roles null: the routed experts of a mixture of experts, the mlp of a dense model.
    """
    if precision.roles is None:
        return frozenset({Role.routed_expert if model.num_experts else Role.dense_mlp})
    refused = [role.name for role in precision.roles if role in NEVER_QUANTIZED]
    if refused:
        raise UserError(
            f"precision.roles names {', '.join(refused)}, which {'is' if len(refused) == 1 else 'are'} never quantized",
            key="precision.roles",
            fix=f"leave out {', '.join(refused)}",
        )
    return frozenset(precision.roles)


@dataclass(frozen=True)
class PrecisionPlan:
    """HF on-disk weight name -> its format, for every parameter of a model, quantized or not."""

    tensors: Mapping[str, TensorFormat]
    parameters: Mapping[str, Parameter]

    @staticmethod
    def build(model: ModelConfig, precision: PrecisionConfig, side: Side) -> PrecisionPlan:
        """The plan of one side of the loop. Raises UserErrors with every weight that has no such format, and UserError
        when a quantized format would touch no weight at all (quantization must never be a silent no-op)."""
        grid: GridConfig = precision.train if side == "train" else precision.rollout
        return PrecisionPlan.with_format(model, TensorFormat.of(grid), quantized_roles(model, precision))

    @staticmethod
    def with_format(model: ModelConfig, tensor_format: TensorFormat, roles: Iterable[Role]) -> PrecisionPlan:
        """The plan that stores the matrices of these roles in one format and everything else in bf16."""
        chosen, bf16 = frozenset(roles), TensorFormat.bf16()
        parameters = {parameter.name: parameter for parameter in family_of(model).parameters(model)}
        tensors: dict[str, TensorFormat] = {}
        problems: dict[tuple[Role, tuple[int, ...]], UserError] = {}
        for name, parameter in parameters.items():
            quantized = parameter.role in chosen and _is_matrix(parameter) and tensor_format.quantized
            tensors[name] = tensor_format if quantized else bf16
            if quantized and (parameter.role, parameter.shape) not in problems:
                try:
                    tensor_format.check_shape(name, parameter.shape)
                except UserError as error:
                    problems[parameter.role, parameter.shape] = error
        if problems:
            raise UserErrors(list(problems.values()))
        if tensor_format.quantized and not any(tensor.quantized for tensor in tensors.values()):
            present = sorted({p.role.name for p in parameters.values() if p.role not in NEVER_QUANTIZED and _is_matrix(p)})
            raise UserError(
                f"{tensor_format} would quantize nothing: model {model.name} has no weight with role "
                f"{', '.join(sorted(role.name for role in chosen)) or 'in an empty list'}",
                key="precision.roles",
                fix=f"'precision.roles=[{','.join(present)}]'",
            )
        return PrecisionPlan(tensors, parameters)

    @staticmethod
    def from_quantization_config(model: ModelConfig, quantization_config: Mapping[str, Any] | None) -> PrecisionPlan:
        """The plan of a checkpoint that someone else wrote, from the `quantization_config` of its config.json.

        None is a bf16 checkpoint. Raises UserError for methods and grids that are not understood: an unknown method
        must never pass as bf16. The convention of a foreign INT checkpoint is unknown (None).
        """
        parameters = {parameter.name: parameter for parameter in family_of(model).parameters(model)}
        return PrecisionPlan({}, parameters).reread(quantization_config)

    def reread(self, quantization_config: Mapping[str, Any] | None) -> PrecisionPlan:
        """The plan that a quantization_config gives for this plan's parameters; see `from_quantization_config`."""
        format_of_module = _reader(quantization_config)
        tensors = {
            name: format_of_module(name.removesuffix(".weight")) if _is_linear(parameter) else TensorFormat.bf16()
            for name, parameter in self.parameters.items()
        }
        return PrecisionPlan(tensors, self.parameters)

    def fused_with(self, name: str) -> tuple[str, ...]:
        """This weight and those that share a global scale with it, in the table's order; alone where its format has none."""
        if not self.format_of(name).has_global_scale:
            return (name,)
        return tuple(other for other in self.same_matrix(name) if self.tensors[other] == self.tensors[name])

    def same_matrix(self, name: str) -> tuple[str, ...]:
        """This weight and those that engines lay into one matrix with it, in the table's order."""
        matrix = self.parameters[name].fused
        return (name,) if matrix is None else tuple(self._fused[matrix])

    @cached_property
    def _fused(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.fused is not None:
                found.setdefault(parameter.fused, []).append(name)
        return found

    def format_of(self, name: str) -> TensorFormat:
        """Format of one on-disk weight; raises UserError for a name the family's table does not have."""
        try:
            return self.tensors[name]
        except KeyError:
            raise UserError(f"{name} is not a parameter of this model family") from None

    @property
    def quantized(self) -> dict[str, TensorFormat]:
        """Only the quantized weights."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.quantized}

    @property
    def formats(self) -> dict[str, str]:
        """HF weight name -> format name, as engines describe themselves."""
        return {name: tensor.format.name for name, tensor in self.tensors.items()}

    def summary(self) -> str:
        """`routed_expert 1152 x int4 group 32 exact, 97 x bf16`: weights by role and format."""
        counts: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            key = f"{self.parameters[name].role.name} {tensor}" if tensor.quantized else "bf16"
            counts[key] = counts.get(key, 0) + 1
        return ", ".join(f"{count} x {key}" for key, count in sorted(counts.items(), key=lambda item: item[0] == "bf16"))

    def ignored_modules(self) -> list[str]:
        """Linear modules that stay bf16, each by its full name: patterns have swallowed neighbours before.

        Beside them what engines fuse of them (`gate_up_proj`): SGLang looks for those names in models, DeepSeek's among them,
        that do not tell it what was fused, and would take the module for a quantized one.
        """
        kept = {
            name: parameter
            for name, parameter in self.parameters.items()
            if _is_linear(parameter) and not self.tensors[name].quantized
        }
        modules = [name.removesuffix(".weight") for name in kept]
        fused = [
            matrix
            for matrix, parts in self._fused.items()
            if all(part in kept and kept[part].role is not Role.routed_expert for part in parts)
        ]
        return [*modules, *fused, *([] if "lm_head" in modules else ["lm_head"])]  # a tied lm_head is not in the table

    def quantization_config(self) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint in this plan's format; None when nothing is quantized."""
        grids = sorted(set(self.quantized.values()), key=str)
        if not grids:
            return None
        if len(grids) > 1:
            raise UserError(f"one checkpoint cannot mix {' and '.join(map(str, grids))}")
        (grid,) = grids
        if grid.format is Format.fp8 and grid.strategy == "block":
            return {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
                "modules_to_not_convert": self.ignored_modules(),
            }
        scheme = {"targets": ["Linear"], "weights": _ct_weights(grid), "input_activations": None, "output_activations": None}
        if grid.format is Format.fp8:
            scheme["input_activations"] = _ct_dynamic_activations(grid)
        return {
            "quant_method": "compressed-tensors",
            "format": _CT_FORMATS[grid.format],
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": self.ignored_modules(),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def differences(self, other: PrecisionPlan, names: tuple[str, str] = ("run", "checkpoint")) -> list[str]:
        """Every way in which two plans of one model differ, grouped; [] when they agree.

        `names` label self and other. An unknown convention (foreign checkpoint) is not a difference: scales are stored.
        """
        groups: dict[str, list[str]] = {}
        for name in [*self.tensors, *(name for name in other.tensors if name not in self.tensors)]:
            mine, theirs = self.tensors.get(name), other.tensors.get(name)
            if mine is None or theirs is None:
                groups.setdefault(f"only in {names[0] if theirs is None else names[1]}", []).append(name)
                continue
            for reason in grid_differences(mine, theirs, names):
                role = self.parameters[name].role.name if name in self.parameters else "unknown role"
                groups.setdefault(f"{role}: {reason}", []).append(name)
        return [f"{reason}: {shorten(found)}" for reason, found in groups.items()]


QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors' older name


def nested_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a config.json, wherever it is nested; None for a bf16 checkpoint. UserError for one that is no
    object, and where two differ."""
    holders = [config, *(value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))]
    found: list[Any] = []
    for holder in holders:
        for key in QUANTIZATION_KEYS:
            if holder.get(key) is not None and holder[key] not in found:
                found.append(holder[key])
    if not found:
        return None
    if len(found) > 1:
        raise UserError("config.json has two quantization_configs that differ", fix="leave the one that describes the weights")
    if not isinstance(found[0], dict):
        raise UserError("quantization_config of config.json is no object", fix="download config.json again")
    return found[0]


def without_quantization_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose `nested_quantization_config` is None."""

    def bare(holder: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in holder.items() if key not in QUANTIZATION_KEYS}

    return {
        key: bare(value) if key.endswith("_config") and isinstance(value, dict) else value for key, value in bare(config).items()
    }


def shorten(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def grid_differences(mine: TensorFormat, theirs: TensorFormat, names: tuple[str, str]) -> list[str]:
    """How two grids of one weight differ, in words."""
    a, b = names
    if mine.format is not theirs.format:
        return [f"{a} {mine.format.name}, {b} {theirs.format.name}"]
    found = []
    for field, label in (("strategy", "strategy"), ("group_size", "group_size"), ("scale_dtype", "scale dtype")):
        if getattr(mine, field) != getattr(theirs, field):
            found.append(f"{label} {a} {getattr(mine, field)}, {b} {getattr(theirs, field)}")
    if mine.symmetric != theirs.symmetric:
        kind = {True: "symmetric", False: "asymmetric"}
        found.append(f"{a} {kind[mine.symmetric]}, {b} {kind[theirs.symmetric]}")
    if mine.convention is not theirs.convention and None not in (mine.convention, theirs.convention):
        assert mine.convention and theirs.convention
        found.append(f"convention {a} {mine.convention.name}, {b} {theirs.convention.name}")
    return found


def _is_matrix(parameter: Parameter) -> bool:
    return len(parameter.shape) == 2 and parameter.name.endswith(".weight")


def _is_linear(parameter: Parameter) -> bool:
    """What a `targets: [Linear]` of someone else's config reaches: also routers and lm_head."""
    return _is_matrix(parameter) and parameter.role not in (Role.embedding, Role.norm)


def _ct_weights(grid: TensorFormat) -> dict[str, Any]:
    """`weights` of a compressed-tensors scheme. `observer_kwargs` carries the convention; every reader accepts it."""
    integer = grid.format in (Format.int4, Format.int8)
    strategy = "tensor_group" if grid.format is Format.nvfp4 else grid.strategy
    return {
        "num_bits": grid.bits,
        "type": "int" if integer else "float",
        "symmetric": grid.symmetric,
        "strategy": strategy,
        "group_size": grid.group_size if strategy.endswith("group") else None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": _CT_SCALE_DTYPES.get(grid.format),
        "observer": "minmax",
        "observer_kwargs": {"convention": grid.convention.name} if grid.convention else {},
    }


def _ct_dynamic_activations(grid: TensorFormat) -> dict[str, Any]:
    strategy = "token" if grid.strategy == "channel" else "tensor"
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": True, "observer": None}


def _reader(config: Mapping[str, Any] | None) -> Callable[[str], TensorFormat]:
    """Module name -> format, as the program that wrote this quantization_config means it."""
    if config is None:
        return lambda module: TensorFormat.bf16()
    method = config.get("quant_method")
    try:
        if method == "compressed-tensors":
            return _compressed_tensors_reader(config)
        if method == "fp8":
            return _fp8_reader(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # somebody else's JSON: any key may be of any type
        raise UserError(
            f"quantization_config cannot be understood ({type(error).__name__}: {str(error)[:100]})",
            fix="download config.json again, or convert the original bf16 checkpoint instead",
        ) from None
    raise UserError(
        f"quantization_config.quant_method is {method!r:.80}; readable are compressed-tensors and fp8",
        fix="convert the original bf16 checkpoint instead",
    )


def _fp8_reader(config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
    block = config.get("weight_block_size")
    if block not in (None, [FP8_BLOCK, FP8_BLOCK]):
        raise UserError(f"quantization_config.weight_block_size is {block!r:.80}; readable is [{FP8_BLOCK}, {FP8_BLOCK}]")
    if config.get("fmt", "e4m3") != "e4m3":
        raise UserError(f"quantization_config.fmt is {config['fmt']!r:.80}; readable is 'e4m3'")
    grid = TensorFormat.fp8("block" if block else "tensor")
    entries = frozenset(entry.strip(".") for entry in _names(config, "modules_to_not_convert"))

    def format_of(module: str) -> TensorFormat:
        # whole dotted components: `mlp.gate` must not swallow `mlp.gate_up_proj`
        parts = module.split(".")
        runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return TensorFormat.bf16() if any(run in entries for run in runs) else grid

    return format_of


def _names(holder: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names or patterns; absent and null count as empty."""
    found = holder.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(f"quantization_config: {key} is {found!r:.80}; it must be a list of names")
    return found


def _compressed_tensors_reader(config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
    ignored = _Matcher(_names(config, "ignore"))
    schemes = [
        ("Linear" in targets, _Matcher(targets), _ct_grid(scheme["weights"], scheme.get("format") or config.get("format")))
        for scheme in config["config_groups"].values()
        if (targets := _names(scheme, "targets"))
    ]
    if not schemes:
        raise UserError("quantization_config: config_groups name no targets", fix="download config.json again")

    def format_of(module: str) -> TensorFormat:
        if not ignored(module):
            for every_linear, targeted, grid in schemes:
                if every_linear or targeted(module):
                    return grid
        return TensorFormat.bf16()

    return format_of


class _Matcher:
    """compressed-tensors' matching: an exact module name, or `re:` and a pattern matched from the start.

    A pattern of somebody else's config.json may take for ever, so all matching together has MATCH_SECONDS.
    """

    def __init__(self, entries: list[str]) -> None:
        self.names = frozenset(entries)
        self.patterns: list[tuple[str, Any]] = []
        self.left = MATCH_SECONDS
        for entry in entries:
            if entry.startswith("re:"):
                try:
                    self.patterns.append((entry, regex.compile(entry[3:], cache_pattern=False)))
                except (regex.error, RecursionError, OverflowError, MemoryError) as error:
                    problem = f"quantization_config: {entry!r:.80} is no pattern: {error!s:.80}"
                    raise UserError(problem, fix=_PATTERN_FIX) from None

    def __call__(self, module: str) -> bool:
        if module in self.names:
            return True
        for entry, pattern in self.patterns:
            started = time.process_time()
            try:
                if self.left > 0 and pattern.match(module, timeout=self.left):
                    return True
            except TimeoutError:
                self.left = 0.0
            self.left -= time.process_time() - started
            if self.left <= 0:
                raise UserError(f"quantization_config: matching {entry!r:.80} takes too long", fix=_PATTERN_FIX)
        return False


def _ct_grid(weights: Mapping[str, Any] | None, container: str | None) -> TensorFormat:
    """A compressed-tensors `weights` entry as a TensorFormat; raises UserError for what cannot be read."""
    if weights is None:
        return TensorFormat.bf16()

    def value(key: str) -> Any:
        return weights.get(key)  # someone else's JSON: a key that is absent reads as null

    bits, group = value("num_bits"), value("group_size")
    # compressed-tensors' own reading of a strategy that is not there
    strategy = value("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy in ("group", "tensor_group") and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
        raise UserError(f"quantization_config: group_size is {group!r:.80}; it must be a positive whole number")
    if value("actorder") not in (None, "static", "weight"):
        raise UserError(f"quantization_config: activation order {value('actorder')!r:.80} cannot be read")
    kind = value("type") or "int"
    if kind == "int" and bits in (4, 8) and strategy in ("group", "channel") and container == "pack-quantized":
        kwargs = value("observer_kwargs") or {}
        convention = Convention.__members__.get(kwargs.get("convention", ""))
        return TensorFormat(
            Format.int4 if bits == 4 else Format.int8,
            -1 if strategy == "channel" else int(group),
            convention,
            strategy,
            symmetric=value("symmetric") is not False,
            scale_dtype=_plain_dtype(value("scale_dtype")),
        )
    if kind == "float" and bits == 8 and strategy in ("channel", "tensor", "block"):
        block = value("block_structure")
        if strategy == "block" and block != [FP8_BLOCK, FP8_BLOCK]:
            raise UserError(f"quantization_config: block_structure is {block!r:.80}; readable is [{FP8_BLOCK}, {FP8_BLOCK}]")
        return TensorFormat.fp8(strategy)
    if kind == "float" and bits == 4 and (strategy, group) in _FP4:
        return _FP4[strategy, group]
    raise UserError(
        f"quantization_config: {kind!s:.20}{bits!s:.20} weights, strategy {strategy!s:.20}, group_size {group!s:.20}, "
        f"container {container!s:.40} cannot be read",
        fix="convert the original bf16 checkpoint instead",
    )


def _plain_dtype(name: str | None) -> str:
    return name.removeprefix("torch.") if name else ""
