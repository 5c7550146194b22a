"""What moves in one step: weight sync by format and transport, R3 routes, gradients and the swap of a colocated trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.config.option import engine_layout, trainer_layout
from runner.config.schema import Config
from runner.planner.memory import state_shares, stream_bytes
from runner.planner.parameters import Inventory
from runner.planner.workload import GIB, base_bytes, route_bytes_per_step, route_itemsize, routes_per_token_bytes
from runner.precision.tensor_format import TensorFormat
from runner.weights.transports import TRANSPORTS, on_every_node

NODE_LINK_GB = 400  # GB/s of a node with eight links of 400 Gb/s
HOST_COPY_GB = 50  # GB/s at which a node's ranks together write, hash and read back what they publish; not measured on GPUs


@dataclass(frozen=True)
class Flow:
    """`size` bytes per step of `what`; `how` says over which path and by which formula."""

    what: str
    size: int
    how: str


def bf16_stream_bytes(cfg: Config, inventory: Inventory) -> int:
    plain = tuple(replace(g, rollout=TensorFormat.bf16()) for g in inventory.groups)
    return stream_bytes(cfg, Inventory(inventory.model, plain))


def sync_flows(cfg: Config, inventory: Inventory) -> list[Flow]:
    """Bytes of one weight sync by every transport of the rollout; the configured one is marked."""
    stream, layout = stream_bytes(cfg, inventory), engine_layout(cfg)
    if layout.in_process:
        return [Flow("weight sync, in process", stream, "one copy in rollout format, within the process")]
    engines, ranks = layout.engines, layout.engines * layout.ranks
    flows = {name: transport.traffic(stream, engines, ranks) for name, transport in TRANSPORTS.items()}
    chosen = getattr(cfg.rollout, "weight_transport", None)
    if cfg.cluster.nodes > 1 and on_every_node(cfg):
        flows[str(chosen)] = published(stream, cfg.cluster.nodes, engines, layout.nodes)
    return [Flow(f"weight sync, {name}{' (configured)' if name == chosen else ''}", *flow) for name, flow in flows.items()]


def published(stream: int, nodes: int, engines: int, nodes_per_engine: int = 1) -> tuple[int, str]:
    """(bytes, how) of a sync in which ranks bring a copy to every node: each receives what others own, over all its links."""
    share = stream * (nodes - 1) // nodes
    seconds = share / (NODE_LINK_GB * 1e9) + stream / (HOST_COPY_GB * 1e9)
    over = f" on {nodes_per_engine} nodes each" if nodes_per_engine > 1 else ""
    how = (
        f"{stream / GIB:.1f} GiB into each of {nodes} nodes' shared memory, {share / GIB:.1f} GiB of it over the node's links, "
        f"read by {engines} engines{over}: {seconds:.0f} s at {NODE_LINK_GB} GB/s a node and {HOST_COPY_GB} GB/s into host memory"
    )
    return stream * (nodes + engines * nodes_per_engine) + share * nodes, how


def step_flows(cfg: Config, inventory: Inventory) -> list[Flow]:
    """Everything else that moves in a step, per rank where it says so."""
    par, flows = cfg.parallelism, []
    if cfg.router_replay.rollout:
        routes = route_bytes_per_step(cfg)
        per_token = routes_per_token_bytes(cfg)
        flows.append(
            Flow("R3 routes", routes, f"{per_token} B a token, longest samples; int32 would be {4 // route_itemsize(cfg)}x")
        )
    if not trainer_layout(cfg).in_process:
        shares = max((state_shares(cfg, inventory, s) for s in range(par.pp)), key=lambda s: s.elements)
        parts = ((shares.dense, shares.dense_dp), (shares.expert, shares.expert_dp))
        moved = sum(n * (dp - 1) / dp for n, dp in parts)
        updates = cfg.algorithm.updates_per_rollout
        if moved:
            flows.append(
                Flow("gradient reduce-scatter", int(moved * 4) * updates, "per rank, fp32, ring: (dp-1)/dp of its parameters")
            )
            flows.append(Flow("parameter all-gather", int(moved * base_bytes(cfg)) * updates, "per rank, bf16, ring"))
        if cfg.trainer.optimizer.cpu_offload:
            flows.append(
                Flow(
                    "offloaded Adam",
                    int(shares.optimizer_elements * 6) * updates,
                    "per rank: fp32 gradients down, bf16 weights up",
                )
            )
        if par.colocate:
            kept = shares.elements * base_bytes(cfg) + (
                0 if cfg.trainer.optimizer.cpu_offload else shares.optimizer_elements * 12
            )
            flows.append(
                Flow("trainer asleep and awake", int(2 * kept), "per rank: weights and optimizer to host memory and back")
            )
    return flows
