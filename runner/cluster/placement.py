"""Which node holds which ranks and engines: `placement` is what `plan` prints and what a run starts. Torch-free.

Megatron-core's rank order is tp-cp-ep-dp-pp, fastest first. Dense layers see tp-cp-dp-pp; expert layers see etp-ep-edp-pp, where
edp is the data-parallel group of one expert shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runner.config.option import engine_layout, trainer_layout
from runner.config.schema import Config


@dataclass(frozen=True)
class Coordinates:
    """Of one trainer rank, in both views."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Place:
    """One GPU. `rank` and `coordinates` are None where no trainer runs; `engine` is None where no engine runs."""

    gpu: int
    node: int
    local: int
    rank: int | None
    coordinates: Coordinates | None
    engine: int | None
    engine_rank: int | None


def coordinates(rank: int, *, ranks: int, tp: int, cp: int, pp: int, ep: int, etp: int) -> Coordinates:
    """Coordinates of `rank`; the sizes must divide `ranks` (a rule reports it before)."""
    dp, edp = ranks // (tp * cp * pp), ranks // (ep * etp * pp)
    return Coordinates(
        tp=rank % tp,
        cp=rank // tp % cp,
        dp=rank // (tp * cp) % dp,
        pp=rank // (tp * cp * dp),
        etp=rank % etp,
        ep=rank // etp % ep,
        edp=rank // (etp * ep) % edp,
    )


def gpus_needed(cfg: Config) -> int:
    par = cfg.parallelism
    return max(par.gpus, par.rollout_gpus) if par.colocate else par.gpus + par.rollout_gpus


def place(cfg: Config) -> list[Place]:
    """Every GPU in use, in order: trainer ranks from GPU 0; engines on the same GPUs, or after the trainer's."""
    par, per_node = cfg.parallelism, max(cfg.cluster.gpus_per_node, 1)
    first_engine_gpu = 0 if par.colocate else par.gpus
    layout = engine_layout(cfg)
    engine_gpus = layout.engines * layout.ranks if layout.on_gpu else 0
    places = []
    for gpu in range(gpus_needed(cfg)):
        rank = gpu if gpu < par.gpus else None
        at = None
        if rank is not None:
            at = coordinates(rank, ranks=par.ranks, tp=par.tp, cp=par.cp, pp=par.pp, ep=par.ep, etp=par.etp)
        position = gpu - first_engine_gpu
        served = 0 <= position < engine_gpus
        engine, engine_rank = divmod(position, layout.ranks) if served else (None, None)
        places.append(Place(gpu, gpu // per_node, gpu % per_node, rank, at, engine, engine_rank))
    return places


@dataclass(frozen=True)
class RankPlace:
    """A trainer rank on its node. `device`: index among the devices that the run has there; of a CPU rank, its place in line."""

    rank: int
    device: int


@dataclass(frozen=True)
class EnginePlace:
    """An engine, or its part on this node: ranks [first_rank, first_rank + ranks), on devices from `device` on."""

    engine: int
    first_rank: int
    ranks: int
    device: int


@dataclass(frozen=True)
class NodePlace:
    """What one node holds. `gpus`: how many of its GPUs, 0 on a CPU."""

    node: int
    gpus: int
    ranks: tuple[RankPlace, ...]
    engines: tuple[EnginePlace, ...]


@dataclass(frozen=True)
class Placement:
    """Every node of a run, in order."""

    nodes: tuple[NodePlace, ...]

    def ranks(self) -> Iterator[tuple[NodePlace, RankPlace]]:
        """Ranks 0, 1, ... with their nodes."""
        found = {place.rank: (node, place) for node in self.nodes for place in node.ranks}
        return (found[rank] for rank in sorted(found))

    def engine(self, index: int) -> list[tuple[NodePlace, EnginePlace]]:
        """The nodes that an engine lies on, its first rank first."""
        return [(node, place) for node in self.nodes for place in node.engines if place.engine == index]


def placement(cfg: Config) -> Placement:
    """On GPUs as `place` has it. On CPUs ranks and engines are dealt out in equal blocks, the first node's first."""
    trainer, engines, nodes = trainer_layout(cfg), engine_layout(cfg), cfg.cluster.nodes
    on_gpus = place(cfg)
    ranks = 0 if trainer.in_process or cfg.parallelism.gpus else cfg.parallelism.ranks
    servers = 0 if engines.in_process or engines.on_gpu else engines.engines
    made = []
    for node in range(nodes):
        here = [p for p in on_gpus if p.node == node]
        trained = [RankPlace(p.rank, p.local) for p in here if p.rank is not None and not trainer.in_process]
        trained += [RankPlace(rank, device) for device, rank in enumerate(_block(ranks, nodes, node))]
        served = [] if engines.in_process else list(_engines(here))
        group, part = divmod(node, engines.nodes)  # of nodes that share engines
        for server in _block(servers, nodes // engines.nodes, group):
            own = engines.ranks // engines.nodes
            served.append(EnginePlace(server, part * own, own, len(served)))
        made.append(NodePlace(node, len(here), tuple(trained), tuple(served)))
    return Placement(tuple(made))


def _block(count: int, nodes: int, node: int) -> range:
    """The node's share of range(count): equal blocks, the first ones larger by one where they do not divide."""
    share, left = divmod(count, nodes)
    start = node * share + min(node, left)
    return range(start, start + share + (node < left))


def _engines(here: list[Place]) -> Iterator[EnginePlace]:
    for engine in sorted({p.engine for p in here if p.engine is not None}):
        parts = [p for p in here if p.engine == engine]
        yield EnginePlace(engine, parts[0].engine_rank or 0, len(parts), parts[0].local)


def placement_problems(cfg: Config) -> list[str]:
    """What makes the placement impossible."""
    par, cluster = cfg.parallelism, cfg.cluster
    there, needed = cluster.nodes * cluster.gpus_per_node, gpus_needed(cfg)
    problems = []
    if needed > there:
        problems.append(
            f"{needed} GPUs are needed, cluster={cluster.name} has {cluster.nodes} x {cluster.gpus_per_node} = {there}"
        )
    if par.gpus and par.ranks % (par.tp * par.cp * par.pp):
        problems.append(f"tp {par.tp} x cp {par.cp} x pp {par.pp} does not divide {par.ranks} ranks")
    if par.gpus and par.ranks % (par.ep * par.etp * par.pp):
        problems.append(f"ep {par.ep} x etp {par.etp} x pp {par.pp} does not divide {par.ranks} ranks")
    if par.rollout_gpus and par.rollout_gpus % par.gpus_per_engine:
        problems.append(f"{par.gpus_per_engine} GPUs per engine do not divide {par.rollout_gpus} rollout GPUs")
    return problems


def placement_warnings(cfg: Config) -> list[str]:
    """What works but is slow: groups that talk in every layer and span nodes."""
    par, per_node = cfg.parallelism, cfg.cluster.gpus_per_node
    if not per_node:
        return []
    warnings = []
    if par.tp > per_node or per_node % par.tp:
        warnings.append(f"tensor-parallel groups of {par.tp} span nodes of {per_node} GPUs: every layer talks over the network")
    if par.gpus_per_engine > per_node or (par.gpus_per_engine and per_node % par.gpus_per_engine):
        warnings.append(
            f"engines of {par.gpus_per_engine} GPUs span nodes of {per_node} GPUs: every token talks over the network"
        )
    if par.ep * par.etp > per_node:
        warnings.append(f"expert groups of {par.ep * par.etp} span nodes: tokens are dispatched over the network in training")
    return warnings
