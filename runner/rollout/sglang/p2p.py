"""rollout.weight_transport=p2p: what SGLang 0.5.23 offers for RDMA writes into an engine's weights, and what stands in the way.

    server    remote_instance_weight_loader_start_seed_via_transfer_engine, and an engine_info_bootstrap_port of its own: every
              rank registers its parameters with mooncake's TransferEngine (MOONCAKE_PROTOCOL=rdma, MOONCAKE_DEVICE=<HCA>)
    request   GET /remote_instance_transfer_engine_info?rank=R: the TransferEngine's session and, by parameter of the engine (q, k
              and v stacked, experts stacked, this rank's shard), [address, elements, bytes per element]
    write     TransferEngine.batch_transfer_sync_write(session, own addresses, their addresses, lengths), in an update session

It is mapped (`OPTIONS` go into the servers' arguments, tests compare them with SGLang's table) and checked; `obstacles` says why
a run does not use it. Imports no torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from runner.schema import Config, Format

OPTIONS = {"remote_instance_weight_loader_start_seed_via_transfer_engine": True}
PORT = "engine_info_bootstrap_port"  # chosen when a server starts; SGLang's default is the same for all
RDMA = Path("/sys/class/infiniband")


def obstacles(cfg: Config) -> list[str]:
    """Everything that speaks against RDMA writes in this run, on this machine; the last one holds everywhere."""
    found = []
    if cfg.parallelism.rollout_gpus == 0:
        found.append("the engines are on a CPU, and SGLang registers GPU memory only")
    if not (RDMA.is_dir() and any(RDMA.iterdir())):
        found.append("this machine has no RDMA device")
    if importlib.util.find_spec("mooncake") is None:
        found.append("mooncake-transfer-engine is not installed")
    if cfg.precision.rollout.format is not Format.bf16:
        found.append(
            f"{cfg.precision.rollout.format.name} weights lie repacked for their kernel, so bytes cannot be written as sent"
        )
    found.append("SGLang's bootstrap server hands out addresses without a key, and no RDMA write was verified by this version")
    return found
