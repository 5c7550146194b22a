"""Rules of parallel sizes: they multiply to the GPUs, divide the model, and fit the cluster and the engines."""

from __future__ import annotations

from collections.abc import Iterator

from runner.config.choices import LauncherKind
from runner.config.option import engine_layout, trainer_layout
from runner.config.schema import Config
from runner.errors import UserError


def positive(cfg: Config) -> bool:
    """Whether sizes can be divided by at all; numbers.py reports those that cannot."""
    par = cfg.parallelism
    sizes = (par.ranks, par.tp, par.pp, par.cp, par.ep, par.etp, par.engine_ep)
    return min(sizes) >= 1 and par.gpus_per_engine >= 0


def sizes_multiply(cfg: Config) -> Iterator[UserError]:
    par = cfg.parallelism
    if not positive(cfg):
        return
    if par.gpus and par.ranks != par.gpus:
        yield UserError(
            f"{par.ranks} trainer processes on {par.gpus} GPUs; there is one for each",
            key="parallelism.ranks",
            fix=f"parallelism.ranks={par.gpus} parallelism.gpus={par.gpus}",
        )
    dense, expert = par.tp * par.pp * par.cp, par.ep * par.etp * par.pp
    if par.ranks % dense:
        yield UserError(
            f"tp {par.tp} x pp {par.pp} x cp {par.cp} = {dense} does not divide {par.ranks} trainer processes",
            key="parallelism.tp",
            fix=f"sizes whose product divides {par.ranks}, or other parallelism.gpus and ranks",
        )
    if par.ranks % expert:
        yield UserError(
            f"ep {par.ep} x etp {par.etp} x pp {par.pp} = {expert} does not divide {par.ranks} trainer processes",
            key="parallelism.ep",
            fix=f"parallelism.ep={_largest_divisor(par.ranks // par.pp // par.etp, par.ep)}",
        )
    if par.sequence_parallel and par.tp == 1:
        yield UserError(
            "sequence parallelism divides what tensor parallelism repeats, but tp is 1",
            key="parallelism.sequence_parallel",
            fix="parallelism.sequence_parallel=false",
        )


def model_divides(cfg: Config) -> Iterator[UserError]:
    par, model = cfg.parallelism, cfg.model
    if not positive(cfg):
        return
    if model.num_experts == 0:
        for key in ("ep", "engine_ep"):
            if getattr(par, key) > 1:
                yield UserError(
                    f"{model.name} is dense: it has no experts to divide by {getattr(par, key)}",
                    key=f"parallelism.{key}",
                    fix=f"parallelism.{key}=1",
                )
    for key in ("ep", "engine_ep"):
        if model.num_experts % getattr(par, key):
            yield UserError(
                f"{model.num_experts} experts do not divide by {getattr(par, key)}",
                key=f"parallelism.{key}",
                fix=f"parallelism.{key}={_largest_divisor(model.num_experts, getattr(par, key))}",
            )
    engine = engine_layout(cfg)
    for key, size in (("parallelism.tp", par.tp), (engine.ranks_key, engine.ranks)):
        if model.num_heads % size:
            yield UserError(
                f"{model.num_heads} attention heads do not divide by {size}",
                key=key,
                fix=f"{key}={_largest_divisor(model.num_heads, size)}",
            )
        elif not model.kv_lora_rank and model.num_kv_heads % size and size % model.num_kv_heads:
            yield UserError(
                f"{model.num_kv_heads} key/value heads neither divide by {size} nor divide it",
                key=key,
                fix=f"{key}={_largest_divisor(model.num_kv_heads, size)}",
            )


def pipeline_stages(cfg: Config) -> Iterator[UserError]:
    par, layers = cfg.parallelism, cfg.model.num_layers
    if not positive(cfg):
        return
    last = par.last_stage_layers
    if last is None:
        if layers % par.pp:
            even = layers // par.pp + 1
            yield UserError(
                f"{layers} layers do not divide into {par.pp} pipeline stages",
                key="parallelism.pp",
                fix=f"parallelism.last_stage_layers={layers - even * (par.pp - 1)}"
                if layers > even * (par.pp - 1)
                else f"parallelism.pp={_largest_divisor(layers, par.pp)}",
            )
    elif par.pp == 1:
        yield UserError(
            "there is one pipeline stage only", key="parallelism.last_stage_layers", fix="parallelism.last_stage_layers=null"
        )
    elif not 0 < last < layers or (layers - last) % (par.pp - 1):
        yield UserError(
            f"{layers} layers, {last} of them in the last stage, leave {layers - last} for {par.pp - 1} stages",
            key="parallelism.last_stage_layers",
            fix=f"parallelism.last_stage_layers={_last_stage(layers, par.pp)}",
        )


def engines(cfg: Config) -> Iterator[UserError]:
    par = cfg.parallelism
    if not positive(cfg):
        return
    if par.rollout_gpus and not par.gpus_per_engine:
        yield UserError(
            f"0 GPUs per engine, but {par.rollout_gpus} rollout GPUs",
            key="parallelism.gpus_per_engine",
            fix="parallelism.gpus_per_engine=1",
        )
    elif par.gpus_per_engine and par.rollout_gpus % par.gpus_per_engine:
        yield UserError(
            f"{par.rollout_gpus} rollout GPUs do not divide into engines of {par.gpus_per_engine}",
            key="parallelism.gpus_per_engine",
            fix=f"parallelism.gpus_per_engine={_largest_divisor(par.rollout_gpus, par.gpus_per_engine)}",
        )
    engine = engine_layout(cfg)
    if par.engine_ep > 1 and engine.ranks % par.engine_ep:
        yield UserError(
            f"expert parallel {par.engine_ep} does not divide an engine of {engine.ranks} ranks",
            key="parallelism.engine_ep",
            fix=f"parallelism.engine_ep={_largest_divisor(engine.ranks, par.engine_ep)}, or {engine.ranks_key}={par.engine_ep}",
        )
    if par.colocate and par.gpus and par.rollout_gpus != par.gpus:
        yield UserError(
            f"colocated, yet the trainer has {par.gpus} GPUs and the engines {par.rollout_gpus}",
            key="parallelism.rollout_gpus",
            fix=f"parallelism.rollout_gpus={par.gpus} or parallelism.colocate=false",
        )


def cluster_has_gpus(cfg: Config) -> Iterator[UserError]:
    par, cluster = cfg.parallelism, cfg.cluster
    needed = max(par.gpus, par.rollout_gpus) if par.colocate else par.gpus + par.rollout_gpus
    there = cluster.nodes * cluster.gpus_per_node
    if cluster.launcher == LauncherKind.local and cluster.nodes > 1:
        yield UserError(
            f"cluster=local is one machine, not {cluster.nodes}",
            key="cluster.nodes",
            fix="cluster=ray",
        )
    if cluster.nodes > 1:
        for layout, key, what in (
            (trainer_layout(cfg), "trainer", "trainer=megatron"),
            (engine_layout(cfg), "rollout", "rollout=sglang"),
        ):
            if layout.in_process:
                name = getattr(cfg, key).name
                yield UserError(f"{key}={name} is for one machine, the run has {cluster.nodes} nodes", key=key, fix=what)
    if needed > there:
        nodes = -(-needed // max(1, cluster.gpus_per_node))
        fix = f"cluster.nodes={nodes}" if cluster.gpus_per_node else f"cluster.gpus_per_node={needed}"
        yield UserError(
            f"{needed} GPUs are needed, the cluster has {cluster.nodes} x {cluster.gpus_per_node} = {there}",
            key="cluster.nodes" if cluster.gpus_per_node else "cluster.gpus_per_node",
            fix=f"{fix}, or a smaller parallelism",
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return next((size for size in range(max(1, min(at_most, number)), 0, -1) if number % size == 0), 1)


def _last_stage(layers: int, stages: int) -> int:
    """Layers of the last stage when the others get the even share, rounded up while something is left."""
    share = -(-layers // stages)
    while share > 1 and layers - share * (stages - 1) < 1:
        share -= 1
    return layers - share * (stages - 1)


RULES = (sizes_multiply, model_divides, pipeline_stages, engines, cluster_has_gpus)
