"""Rules of weight formats: grids, shapes, shards, and what quantized training needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runner.config.choices import BaseDtype
from runner.config.option import engine_layout, trainer_layout
from runner.config.schema import Config, GridConfig, ModelConfig, QatPlacement, Role
from runner.errors import UserError, UserErrors
from runner.models import FAMILIES, family_of
from runner.models.family import Cut, Parameter
from runner.precision.formats import all_formats, spec_of
from runner.precision.plan import PrecisionPlan, quantized_roles

TRAIN_ONLY = "int4_train"  # the control experiment that quantizes the trainer and not the engine


def one_of_each(model: ModelConfig) -> ModelConfig:
    """The same shapes and roles with as few layers and experts as have them all: a table of dozens, not of 100,000."""
    layers = min(model.num_layers, model.num_dense_layers + 1)
    return replace(model, num_layers=layers, num_experts=min(model.num_experts, 1))


def known_model(cfg: Config) -> bool:
    return cfg.model.family in FAMILIES and cfg.model.num_layers > 0


def weights_have_formats(cfg: Config) -> Iterator[UserError]:
    """The group size divides every quantized input dimension, and quantization reaches something."""
    if not known_model(cfg):
        return
    seen = set()
    for side in ("train", "rollout"):
        try:
            PrecisionPlan.build(one_of_each(cfg.model), cfg.precision, side)
        except UserErrors as errors:
            problems = errors.errors
        except UserError as error:
            problems = [error]
        else:
            continue
        for problem in problems:
            if str(problem) not in seen:
                seen.add(str(problem))
                yield problem


def grids_agree(cfg: Config) -> Iterator[UserError]:
    """Both sides compute with the same integers, except in the two control experiments."""
    train, rollout, name = cfg.precision.train, cfg.precision.rollout, cfg.precision.name
    if not spec_of(train.format).quantized or name == TRAIN_ONLY:
        return
    if train.format != rollout.format:
        yield UserError(
            f"the trainer quantizes to {train.format}, the engine to {rollout.format}: two different policies",
            key="precision.rollout.format",
            fix=f"precision.rollout.format={train.format}, or as a control experiment precision={TRAIN_ONLY}",
        )
        return
    for field in ("group_size", "convention"):
        ours, theirs = getattr(train, field), getattr(rollout, field)
        if ours != theirs:
            shown = [value if isinstance(value, int) else value.name for value in (ours, theirs)]
            yield UserError(
                f"the training grid has {field} {shown[0]}, the rollout grid {shown[1]}: integers and scales would differ",
                key=f"precision.rollout.{field}",
                fix=f"set precision.{field} alone; both sides follow it",
            )


def fixed_group_sizes(cfg: Config) -> Iterator[UserError]:
    grids: tuple[GridConfig, ...] = (cfg.precision.train, cfg.precision.rollout)
    for grid in grids:
        fixed = spec_of(grid.format).fixed_group
        if fixed is not None and grid.group_size != fixed:
            yield UserError(
                f"{grid.format} has groups of {fixed} by definition, not {grid.group_size}",
                key="precision.group_size",
                fix="leave precision.group_size out, or choose precision=int4_qat",
            )
            return


def sharded_weights(cfg: Config) -> Iterator[Parameter]:
    """One matrix of each role and shape that the trainer or the engine quantizes."""
    for parameter in family_of(cfg.model).parameters(one_of_each(cfg.model)):
        if parameter.role in quantized_roles(cfg.model, cfg.precision) and len(parameter.shape) == 2:
            yield parameter


def groups_survive_sharding(cfg: Config) -> Iterator[UserError]:
    """A group never lies on two tensor-parallel ranks: its amax, and so its scale, would differ from the checkpoint's."""
    if not known_model(cfg) or bad_roles(cfg):
        return
    par, ranks = cfg.parallelism, engine_layout(cfg).ranks
    expert_shards = ranks // par.engine_ep if par.engine_ep else 1
    yield from _cut_groups(cfg, "trainer", cfg.precision.train, par.tp, par.etp)
    yield from _cut_groups(cfg, "engine", cfg.precision.rollout, ranks, expert_shards)


def _cut_groups(cfg: Config, side: str, grid: GridConfig, tp: int, expert_shards: int) -> Iterator[UserError]:
    per_channel = grid.group_size < 1  # one scale for all inputs; an engine takes it as it is, a trainer computes it itself
    if not spec_of(grid.format).quantized or (per_channel and side == "engine"):
        return
    cut: dict[tuple[str, int, int, int, bool], list[str]] = {}
    for parameter in sharded_weights(cfg):
        projection = parameter.name.split(".")[-2]
        shards = expert_shards if parameter.role is Role.routed_expert else tp
        if parameter.cut is Cut.whole:
            continue
        if parameter.cut is Cut.kv_heads:
            shards = min(shards, cfg.model.num_kv_heads)
        row = parameter.cut is Cut.inputs
        size = parameter.shape[1] if row else parameter.shape[0]
        unit = (size if per_channel else grid.group_size) if row else spec_of(grid.format).block_rows
        if shards > 1 and size % (shards * unit):
            cut.setdefault((parameter.role.name, size, shards, unit, row), []).append(projection)
    for (role, size, shards, unit, row), projections in cut.items():
        key, fix = _sharding_fix(cfg, side, role == Role.routed_expert.name, size, shards, unit)
        yield UserError(
            f"{role} weights {', '.join(projections)} have {size} {'inputs' if row else 'outputs'}; over {shards} {side} shards "
            f"that is {size / shards:g} each, which cuts a group of {unit}",
            key=key,
            fix=fix,
        )


def _sharding_fix(cfg: Config, side: str, expert: bool, size: int, shards: int, unit: int) -> tuple[str, str]:
    """(key, what to type): the largest number of shards that cuts no group."""
    par = cfg.parallelism
    fits = next(n for n in range(shards - 1, 0, -1) if shards % n == 0 and (n == 1 or size % (n * unit) == 0))
    if expert and side == "engine":
        return (
            "parallelism.engine_ep",
            f"parallelism.engine_ep={engine_layout(cfg).ranks // fits}, or a smaller precision.group_size",
        )
    if expert:
        return "parallelism.etp", f"parallelism.etp={fits}, or a smaller precision.group_size"
    if side == "trainer":
        return "parallelism.tp", f"parallelism.tp={fits}, or a smaller precision.group_size"
    ep = f" parallelism.engine_ep={min(par.engine_ep, fits)}" if par.engine_ep > 1 else ""
    key = engine_layout(cfg).ranks_key
    return key, f"{key}={fits}{ep}, or leave the role out of precision.roles"


def bad_roles(cfg: Config) -> bool:
    """Whether precision.roles cannot be had of this model; `weights_have_formats` says why."""
    try:
        quantized_roles(cfg.model, cfg.precision)
    except UserError:
        return True
    return False


def qat_needs_masters(cfg: Config) -> Iterator[UserError]:
    """Quantizing in place destroys the weight it reads, so there must be a master to return to."""
    precision = cfg.precision
    if not spec_of(precision.train.format).quantized or precision.qat_placement is QatPlacement.forward:
        return
    wide = precision.base_dtype == BaseDtype.float32
    if wide or not trainer_layout(cfg).masters:
        why = "precision.base_dtype=float32 has no separate master" if wide else "trainer.master_weights is false"
        yield UserError(
            f"quantizing in place needs fp32 masters beside bf16 weights, but {why}",
            key="precision.qat_placement",
            fix="precision.qat_placement=forward",
        )


def formats_own(cfg: Config) -> Iterator[UserError]:
    """What each format says of the keys that are its own."""
    weights = tuple(sharded_weights(cfg)) if known_model(cfg) and not bad_roles(cfg) else ()
    for spec in all_formats():
        yield from spec.rules(cfg, weights)


RULES = (
    weights_have_formats,
    grids_agree,
    fixed_group_sizes,
    groups_survive_sharding,
    qat_needs_masters,
    formats_own,
)
