"""What would make a run fit, found by trying: every change is planned again, and only what really fits is proposed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import combinations

from runner.cluster.placement import placement_problems
from runner.config import rules
from runner.config.choices import KvDtype, Recompute
from runner.config.option import engine_layout, trainer_layout
from runner.config.schema import Config
from runner.errors import UserError
from runner.planner.memory import MemoryPlan, plan_memory
from runner.planner.parameters import Inventory, take_inventory
from runner.planner.workload import longest_sequence_tokens, samples_per_step
from runner.precision.formats import all_formats, spec_of

TOKENS_STEP = 512  # granularity of a proposed max_tokens_per_gpu
TOKENS_LIMIT = 65536  # larger micro-batches gain nothing: the matmuls have long filled the GPU
Change = tuple[str, Callable[[Config], None]]  # the overrides to type, and what they do to a config


def _set(path: str, value: object, override: str | None = None) -> Change:
    def apply(cfg: Config) -> None:
        *parents, leaf = path.split(".")
        target: object = cfg
        for name in parents:
            target = getattr(target, name)
        setattr(target, leaf, value)

    shown = str(value).lower() if isinstance(value, bool) else value
    return override or f"{path}={shown}", apply


def _chain(*changes: Change) -> Change:
    def apply(cfg: Config) -> None:
        for _, change in changes:
            change(cfg)

    return " ".join(text for text, _ in changes), apply


def single_changes(cfg: Config) -> Iterator[Change]:
    """Knobs that trade speed for memory, cheapest first, only those that change this config."""
    if cfg.trainer.recompute != Recompute.full:
        yield _set("trainer.recompute", Recompute.full)
    if cfg.trainer.logprob_chunk_tokens > 1024:
        yield _set("trainer.logprob_chunk_tokens", 1024)
    longest = longest_sequence_tokens(cfg)
    if cfg.trainer.max_tokens_per_gpu > longest:
        yield _set("trainer.max_tokens_per_gpu", longest)
    if not cfg.trainer.optimizer.cpu_offload and not cfg.precision.fp8_param_gather and cfg.parallelism.gpus:
        yield _set("trainer.optimizer.cpu_offload", True)
    if cfg.precision.kv_cache.num_bytes is None:
        yield from (_set("precision.kv_cache", dtype) for dtype in KvDtype if dtype.num_bytes)
    filled = engine_layout(cfg).memory_fraction
    if filled is not None:
        for fraction in (0.9, 0.85, 0.8, 0.7, 0.6):
            if fraction != filled:
                yield _set("rollout.memory_fraction", fraction)
    elif cfg.rollout.max_concurrency > 8:
        yield _set("rollout.max_concurrency", cfg.rollout.max_concurrency // 4)
    if not spec_of(cfg.precision.rollout.format).quantized:
        yield from (quantized(spec.name, *spec.proposed) for spec in all_formats() if spec.proposed)
    yield from more_gpus(cfg)


def quantized(name: str, option: str, group_size: int) -> Change:
    def apply(cfg: Config) -> None:
        for side in (cfg.precision.train, cfg.precision.rollout):
            side.format, side.group_size = name, group_size
        cfg.precision.group_size = group_size

    return f"precision={option} precision.group_size={group_size}", apply


def more_gpus(cfg: Config) -> Iterator[Change]:
    par = cfg.parallelism
    if not par.gpus or trainer_layout(cfg).in_process:
        return
    if par.gpus_per_engine * 2 <= par.rollout_gpus:
        size = par.gpus_per_engine * 2
        experts = _set("parallelism.engine_ep", size) if cfg.model.num_experts and cfg.model.num_experts % size == 0 else None
        engine = _set("parallelism.gpus_per_engine", size)
        yield _chain(engine, experts) if experts else engine
    if cfg.model.num_experts and cfg.model.num_experts % (par.ep * 2) == 0 and par.ranks % (par.ep * 2 * par.etp * par.pp) == 0:
        yield _set("parallelism.ep", par.ep * 2)
    for factor in (2, 4, 8):
        changes = [_set("parallelism.gpus", par.gpus * factor), _set("parallelism.ranks", par.ranks * factor)]
        if par.colocate:
            changes.append(_set("parallelism.rollout_gpus", par.rollout_gpus * factor))
        changes.append(_set("cluster.nodes", cfg.cluster.nodes * factor))
        if cfg.model.num_experts and cfg.model.num_experts % (par.ep * factor) == 0:
            changes.append(_set("parallelism.ep", par.ep * factor))
        yield _chain(*changes)


Inventories = dict[str, Inventory]  # by the formats they were taken for: reading the table of a large model takes a second


def _formats(cfg: Config) -> str:
    return repr((cfg.precision.train, cfg.precision.rollout, cfg.precision.roles))


def _changed(cfg: Config, changes: tuple[Change, ...]) -> Config:
    changed = copy.deepcopy(cfg)
    for _, apply in changes:
        apply(changed)
    return changed


def _problems(cfg: Config) -> set[str]:
    return {error.problem for error in rules.check(cfg)}


def try_changes(
    cfg: Config, inventory: Inventory, changes: tuple[Change, ...], known: Inventories | None = None
) -> MemoryPlan | None:
    """The memory plan with the changes, or None where they cannot be placed. `known` keeps inventories between calls."""
    known = {} if known is None else known
    known[_formats(cfg)] = inventory
    changed = _changed(cfg, changes)
    if placement_problems(changed):
        return None
    try:
        formats = _formats(changed)
        if formats not in known:
            known[formats] = take_inventory(changed)
        return plan_memory(changed, known[formats])
    except UserError:  # a grid or a split that this model does not have
        return None


def what_would_fit(cfg: Config, inventory: Inventory, limit: int = 6) -> list[str]:
    """Overrides that make the plan fit, and that the rules allow: single changes, or pairs where none is enough; then triples."""
    changes = list(single_changes(cfg))
    found: list[str] = []
    known: Inventories = {}
    before = _problems(cfg)
    for size in (1, 2, 3):
        for chosen in combinations(changes, size):
            keys = [part.split("=")[0] for text, _ in chosen for part in text.split()]
            if len(set(keys)) < len(keys):
                continue
            plan = try_changes(cfg, inventory, chosen, known)
            if plan is not None and plan.fits and _problems(_changed(cfg, chosen)) <= before:
                found.append(" ".join(text for text, _ in chosen))
                if len(found) == limit:
                    return found
        if found:
            return found
    return found


def largest_max_tokens(cfg: Config, inventory: Inventory, keep_free: float = 0.05) -> int | None:
    """The largest trainer.max_tokens_per_gpu that leaves `keep_free` of every memory free; None where none does.

    Bounded by what one rank gets of an optimizer step, every sample at full length.
    """

    def fits(tokens: int) -> bool:
        plan = try_changes(cfg, inventory, (_set("trainer.max_tokens_per_gpu", tokens),))
        phases = [] if plan is None else [p for p in plan.phases if p.name in ("train", "run")]
        return plan is not None and all(phase.headroom >= keep_free * phase.capacity for phase in phases)

    par = cfg.parallelism
    dp = max(par.ranks // (par.tp * par.cp * par.pp), 1)
    update = samples_per_step(cfg) * longest_sequence_tokens(cfg) // max(cfg.algorithm.updates_per_rollout, 1)
    low, high = 0, min(update // (dp * par.cp), TOKENS_LIMIT) // TOKENS_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * TOKENS_STEP):
            low = middle
        else:
            high = middle - 1
    return low * TOKENS_STEP or None
