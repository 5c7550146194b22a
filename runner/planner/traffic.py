"""What moves in one step: weight sync by format and transport, R3 routes, gradients and the swap of a colocated trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runner.planner.memory import state_shares
from runner.planner.parameters import Inventory
from runner.planner.workload import base_bytes, num_engines, route_bytes_per_step, route_itemsize, routes_per_token_bytes
from runner.precision.tensor_format import TensorFormat
from runner.schema import Config, MegatronTrainerConfig, SglangRolloutConfig


@dataclass(frozen=True)
class Flow:
    """`size` bytes per step of `what`; `how` says over which path and by which formula."""

    what: str
    size: int
    how: str


def stream_bytes(cfg: Config, inventory: Inventory, grid: TensorFormat | None = None) -> int:
    """One whole copy of the weights in rollout format, or with `grid` in place of the quantized tensors' own."""
    return sum(
        g.count * (grid if grid and g.rollout.quantized else g.rollout).stored_bytes(g.shape, base_bytes(cfg))
        for g in inventory.groups
    )


def bf16_stream_bytes(cfg: Config, inventory: Inventory) -> int:
    plain = tuple(replace(g, rollout=TensorFormat.bf16()) for g in inventory.groups)
    return stream_bytes(cfg, Inventory(inventory.model, plain))


def sync_flows(cfg: Config, inventory: Inventory) -> list[Flow]:
    """Bytes of one weight sync by every transport of the rollout; the configured one is marked."""
    stream, engines = stream_bytes(cfg, inventory), num_engines(cfg)
    if not isinstance(cfg.rollout, SglangRolloutConfig):
        return [Flow("weight sync, in process", stream, "one copy in rollout format, within the process")]
    gpus = engines * max(cfg.parallelism.gpus_per_engine, 1)
    flows = {
        "tensor": (stream * (1 + engines), f"written once into the host's shared memory, read by {engines} engines"),
        "distributed": (stream * gpus, f"broadcast: every one of {gpus} engine GPUs receives every tensor"),
        "disk_full": (stream * (1 + engines), f"written once, read by {engines} engines"),
        "disk_delta": (
            stream // 100 * (1 + engines),
            "for each 1% of the bytes that changed; written once, read by every engine",
        ),
        "p2p": (stream * engines, "the GPUs of an engine read one copy together and exchange it among themselves"),
    }
    chosen = cfg.rollout.weight_transport
    return [Flow(f"weight sync, {name}{' (configured)' if name == chosen else ''}", *flow) for name, flow in flows.items()]


def step_flows(cfg: Config, inventory: Inventory) -> list[Flow]:
    """Everything else that moves in a step, per rank where it says so."""
    par, flows = cfg.parallelism, []
    if cfg.router_replay.rollout:
        routes = route_bytes_per_step(cfg)
        per_token = routes_per_token_bytes(cfg)
        flows.append(
            Flow("R3 routes", routes, f"{per_token} B a token, longest samples; int32 would be {4 // route_itemsize(cfg)}x")
        )
    if isinstance(cfg.trainer, MegatronTrainerConfig):
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
