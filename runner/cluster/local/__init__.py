"""cluster=local: every process is a child of this one."""

from __future__ import annotations

from pathlib import Path

from runner.cluster.launcher import EngineOrder, EngineProcess, Ranks
from runner.cluster.placement import placement
from runner.config.schema import Config


class LocalLauncher:
    """See the protocol. Trainer and pool end what they asked for."""

    publishes = False

    def host(self, cfg: Config) -> str:
        from runner.rollout.sglang.interface import listen_address

        return listen_address(cfg.cluster)

    def ranks(self, cfg: Config, run_dir: Path | None) -> Ranks:
        from runner.trainer.megatron.ranks import LocalRanks

        return LocalRanks(cfg, run_dir)

    def engines(self, cfg: Config, orders: list[EngineOrder], scratch: Path) -> list[EngineProcess]:
        from runner.rollout.sglang.server import Site

        (node,) = placement(cfg).nodes
        site = Site.here(cfg, scratch, ranks=sum(place.ranks for place in node.engines))
        return [site.server(order, node.engines[order.index].device) for order in orders]

    def forget_weights(self, folders: list[str]) -> None: ...

    def close(self) -> None: ...
