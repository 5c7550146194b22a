"""The section of the config that is rollout=sglang's, and how its servers lie on the machine. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from runner.config.choices import PauseMode, TransferProtocol
from runner.config.limits import LONGEST_SECONDS, number, one_of
from runner.config.option import EngineLayout
from runner.config.schema import Config, RolloutConfig

MIB = 1024**2


def transports() -> tuple[str, ...]:
    from runner.weights.transports import TRANSPORTS

    return tuple(TRANSPORTS)


@dataclass
class SglangRolloutConfig(RolloutConfig):
    memory_fraction: float = number(gt=0, le=1)  # of a GPU's memory, for weights and KV cache
    attention_backend: str = MISSING  # auto, or a name that SGLang knows
    weight_transport: str = one_of(among=transports)  # a file of weights/transports
    transfer_protocol: TransferProtocol = MISSING  # of p2p
    transfer_devices: list[str] = field(default_factory=list)  # of p2p: RDMA devices (mlx5_0, ..); all if empty
    pause_mode: PauseMode = MISSING
    startup_timeout_seconds: float = number(gt=0, le=LONGEST_SECONDS)
    health_interval_seconds: float = number(ge=0, le=LONGEST_SECONDS)  # between looks at whether an engine still works; 0: never
    cpu_engines: int = number(ge=1, le=1024)  # servers on this machine's CPU, where parallelism.rollout_gpus is 0
    cpu_tp: int = number(ge=1, le=1024)  # tensor-parallel ranks of each of them
    cpu_nodes: int = number(ge=1, le=1024)  # nodes of the cluster that each of them lies on
    max_retries: int = number(ge=0, le=1000)
    use_router: bool = MISSING
    cuda_graph_max_batch: int = number(ge=1, le=2**16)
    chunked_prefill_tokens: int = number(ge=1, le=2**24)
    server_args: dict[str, Any] = field(default_factory=dict)  # further SGLang options, checked by name


def settings(cfg: Config) -> SglangRolloutConfig:
    assert isinstance(cfg.rollout, SglangRolloutConfig)
    return cfg.rollout


def on_cpu(cfg: Config) -> bool:
    return cfg.parallelism.rollout_gpus == 0


def layout(cfg: Config) -> EngineLayout:
    """Servers of gpus_per_engine GPUs each, or on the CPU cpu_engines of cpu_tp ranks.

    runtime_bytes: prefill activations, CUDA graphs and metadata outside the static part, by SGLang's own estimate for its server
    (MiB: 512 + 1.5 per chunked prefill token + 2 per graph batch + 128 per GPU of the engine).
    """
    par, rollout = cfg.parallelism, settings(cfg)
    if on_cpu(cfg):
        return EngineLayout(
            engines=rollout.cpu_engines,
            ranks=rollout.cpu_tp,
            ranks_key="rollout.cpu_tp",
            on_gpu=False,
            nodes=rollout.cpu_nodes,
            prefill_tokens=rollout.chunked_prefill_tokens,
        )
    ranks = max(1, par.gpus_per_engine)
    runtime = 512 + 1.5 * rollout.chunked_prefill_tokens + 2 * rollout.cuda_graph_max_batch + 128 * ranks
    return EngineLayout(
        engines=max(1, par.rollout_gpus // ranks),
        ranks=ranks,
        ranks_key="parallelism.gpus_per_engine",
        on_gpu=True,
        nodes=-(-ranks // cfg.cluster.gpus_per_node) if cfg.cluster.gpus_per_node else 1,
        shares_gpus=par.colocate and min(par.gpus, par.rollout_gpus) > 0,
        prefill_tokens=rollout.chunked_prefill_tokens,
        memory_fraction=rollout.memory_fraction,
        runtime_bytes=int(runtime * MIB),
    )
