"""Parameter counts: by role, active per token, and per rank under tensor, pipeline and expert parallelism.

Reads the family's table (`runner.models`) and the precision plan (`runner.precision.plan`); imports no torch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil, prod

from runner.config.schema import Config, ModelConfig, Role
from runner.errors import UserError
from runner.models.family import Cut
from runner.precision.plan import PrecisionPlan, Side
from runner.precision.tensor_format import TensorFormat
from runner.trainer import adapters

SIDES: tuple[Side, Side] = ("train", "rollout")


@dataclass(frozen=True)
class ParameterGroup:
    """`count` parameters alike in everything the planner looks at; shape is that of one, as on disk."""

    role: Role
    layer: int | None
    shape: tuple[int, ...]
    cut: Cut
    train: TensorFormat
    rollout: TensorFormat
    count: int

    @property
    def elements(self) -> int:
        return self.count * prod(self.shape)


@dataclass(frozen=True, eq=False)
class Inventory:
    """All parameters of a model, grouped, with their formats on both sides of the loop. Hashed by identity."""

    model: ModelConfig
    groups: tuple[ParameterGroup, ...]

    @property
    def total(self) -> int:
        return sum(group.elements for group in self.groups)

    @property
    def active(self) -> int:
        """Parameters that one token meets: of the routed experts its top-k, of everything else all."""
        routed = sum(g.elements for g in self.groups if g.role is Role.routed_expert)
        if not routed:
            return self.total
        return self.total - routed + routed * self.model.experts_top_k // self.model.num_experts

    def by_role(self) -> dict[Role, int]:
        counts: Counter[Role] = Counter()
        for group in self.groups:
            counts[group.role] += group.elements
        return {role: counts[role] for role in Role if counts[role]}


def take_inventory(cfg: Config) -> Inventory:
    """Group the family's table by everything that decides memory; raises UserError for an unknown family."""
    train, rollout = (PrecisionPlan.build(cfg.model, cfg.precision, side) for side in SIDES)
    counts: Counter[tuple[object, ...]] = Counter()
    groups: dict[tuple[object, ...], ParameterGroup] = {}
    for p in train.parameters.values():
        on_trainer, on_engine = train.tensors[p.name], rollout.tensors[p.name]
        # names and ids (a plan has one object for each of its formats), because hashing enums and dataclasses takes seconds for
        # the 70,000 experts of a large model
        key = (p.layer, p.shape, p.role.name, p.cut.name, id(on_trainer), id(on_engine))
        if key not in groups:
            groups[key] = ParameterGroup(p.role, p.layer, tuple(p.shape), p.cut, on_trainer, on_engine, 1)
        counts[key] += 1
    return Inventory(cfg.model, tuple(replace(group, count=counts[key]) for key, group in groups.items()))


def adapter_elements(cfg: Config, inventory: Inventory) -> int:
    """Parameters of all low-rank adapters. Experts are stacked with gate over up: they share an A."""
    found = 0
    for group in inventory.groups:
        if group.role in adapters.roles(cfg) and len(group.shape) == 2:
            shared = group.role is Role.routed_expert and group.cut is Cut.outputs
            rows, columns = group.shape
            found += group.count * adapters.elements(cfg, (rows, columns // 2 if shared else columns))
    return found


def base_elements(cfg: Config, inventory: Inventory) -> int:
    """Frozen parameters that lie beside the model's weights, which hold something else: merged, or quantized."""
    chosen = adapters.roles(cfg)
    return sum(
        group.elements for group in inventory.groups if group.train.quantized or (group.role in chosen and len(group.shape) == 2)
    )


def stage_layers(num_layers: int, pp: int, last_stage_layers: int | None) -> list[range]:
    """Global ids of the decoder layers on each pipeline stage: an even split, or a given number on the last stage."""
    if pp == 1:
        return [range(num_layers)]
    last = num_layers // pp if last_stage_layers is None else last_stage_layers
    others = num_layers - last
    parts = pp if last_stage_layers is None else pp - 1
    if (num_layers if last_stage_layers is None else others) % parts or others <= 0:
        raise UserError(
            f"{num_layers} layers do not split over pp={pp} stages with last_stage_layers={last_stage_layers}",
            key="parallelism.last_stage_layers",
            fix=f"parallelism.last_stage_layers={num_layers - (pp - 1) * ceil(num_layers / pp)}",
        )
    size = others // (pp - 1)
    return [range(i * size, (i + 1) * size) for i in range(pp - 1)] + [range(others, num_layers)]


def on_stage(group: ParameterGroup, stage: int, stages: list[range], tied: bool) -> bool:
    """Embeddings and the vision tower lie on the first stage; lm_head, final norm and MTP layers on the last.

    Tied embeddings lie on both (Megatron-core keeps a copy on the last stage and all-reduces their gradient).
    """
    last = stage == len(stages) - 1
    if group.role is Role.embedding:
        return stage == 0 or (last and tied)
    if group.role is Role.vision:
        return stage == 0
    if group.layer is None or group.layer >= stages[-1].stop:
        return last
    return group.layer in stages[stage]


def shard(group: ParameterGroup, *, tp: int, ep: int, etp: int, num_kv_heads: int, vocabulary: int | None = None) -> float:
    """Share of one rank in `group` (0 to 1, above 1/n where something is replicated or padded: `vocabulary` rows in all)."""
    if group.role is Role.routed_expert:
        return 1 / (ep * etp)
    if group.cut is Cut.whole:
        return 1.0
    if group.cut is Cut.kv_heads:
        return 1 / min(tp, max(num_kv_heads, 1))
    if vocabulary is not None and group.role in (Role.embedding, Role.lm_head):
        return vocabulary / group.shape[0] / tp
    return 1 / tp
