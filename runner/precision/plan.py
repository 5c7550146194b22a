"""Which weight is stored in which format: the single source for trainer, converter, weight sync and engine config.

Decided by ROLE from the model family's table, never by a name pattern. Torch-free: rules and the planner read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from runner.config.schema import GridConfig, ModelConfig, PrecisionConfig, Role
from runner.errors import UserError, UserErrors
from runner.models import family_of
from runner.models.family import Parameter
from runner.precision.quantization_config import reader
from runner.precision.tensor_format import TensorFormat

Side = Literal["train", "rollout"]

# a quantized router gave gibberish; the others are few and sensitive, or glue whose matrices engines keep in bf16
HEAD = "lm_head.weight"
NEVER_QUANTIZED = (Role.router, Role.norm, Role.embedding, Role.lm_head, Role.mtp, Role.vision)
_SHOWN = 3  # names listed per difference


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
        format_of_module = reader(quantization_config)
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

    def ties(self, name: str) -> bool:
        """Whether a stored tensor is an lm_head beside the embedding that it is tied to, as in some published folders."""
        return name == HEAD and name not in self.parameters

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
        return {name: tensor.format for name, tensor in self.tensors.items()}

    @cached_property
    def in_stacks(self) -> bool:
        """Whether a folder holds the experts in stacks (`Parameter.stack`), as their family publishes them: in bf16, and in a
        format that has such a form where that is the experts' alone. Other forms have them one by one."""
        stacked = [name for name, parameter in self.parameters.items() if parameter.stack is not None]
        if not self.quantized:
            return bool(stacked)
        matrices = {name for name in stacked if _is_matrix(self.parameters[name])}
        return self.quantized.keys() == matrices and all(t.spec.stacked_config() for t in self.quantized.values())

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
        if self.in_stacks:
            return grids[0].spec.stacked_config()
        return grids[0].spec.quantization_config(grids[0], self.ignored_modules())

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


def shorten(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def grid_differences(mine: TensorFormat, theirs: TensorFormat, names: tuple[str, str]) -> list[str]:
    """How two grids of one weight differ, in words."""
    a, b = names
    if mine.format != theirs.format:
        return [f"{a} {mine.format}, {b} {theirs.format}"]
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
