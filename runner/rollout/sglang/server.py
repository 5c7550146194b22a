"""One SGLang server: a process of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from runner.cluster.launcher import EngineOrder
from runner.config.choices import Drafting
from runner.config.schema import Config
from runner.cores import available_cores
from runner.precision import cpu_matmul
from runner.precision.plan import PrecisionPlan
from runner.rollout.sglang.client import Client
from runner.rollout.sglang.config import on_cpu
from runner.rollout.sglang.interface import listen_address, name_of
from runner.rollout.sglang.model_folder import write_model_folder
from runner.rollout.sglang.plugin.shared import remove_shared_files
from runner.rollout.sglang.process import Child, free_ports
from runner.scratch import environment as temporary_files_in

STUBS = Path(__file__).parent / "stubs"


class Server(Child):
    module = "runner.rollout.sglang.entry"

    def __init__(
        self,
        index: int,
        arguments: dict[str, Any],
        *,
        host: str,
        api_key: str,
        log: Path,
        threads: int,
        variables: dict[str, str],
        scratch: Path | None = None,
    ) -> None:
        """`variables`: environment variables beside those that every server gets. `scratch`: where its temporary files and
        sockets lie, removed by whoever made it."""
        super().__init__(host=host, api_key=api_key, log=log)
        self.index, self.arguments, self.threads = index, arguments, threads
        self.variables, self.scratch = variables, scratch
        self.title = f"SGLang server {index}"

    def start(self) -> None:
        """Pick free ports and start the process."""
        self.port, nccl_port = free_ports(self.host, 2)
        ports = {"host": self.host, "port": self.port, "nccl_port": nccl_port}
        self.launch({"server_args": {**self.arguments, **ports}})

    def kill(self) -> None:
        group = self._process.pid if self._process else None
        super().kill()
        if group is not None:
            remove_shared_files(group)

    def client(self, session: aiohttp.ClientSession, api_key: str, *seconds: float) -> Client:
        return Client(session, self.url, api_key, *seconds)

    def environment(self) -> dict[str, str]:
        env = super().environment()
        if self.scratch is not None:
            env |= temporary_files_in(self.scratch)
        env |= {
            "RUNNER_SGLANG_SERVER": "1",
            "SGLANG_PLUGINS": env.get("SGLANG_PLUGINS", "runner"),
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # see context_length in arguments.py
            "HF_HUB_OFFLINE": "1",  # the folder of the model is local and complete
            "TOKENIZERS_PARALLELISM": "false",
            "GLOO_SOCKET_IFNAME": name_of(self.host),  # where the processes of an engine listen for each other
            "NCCL_SOCKET_IFNAME": name_of(self.host),
            **self.variables,
        }
        if self.arguments["device"] == "cpu":
            env |= {
                "SGLANG_USE_CPU_ENGINE": "1",
                "TORCHDYNAMO_DISABLE": "1",
                "OMP_NUM_THREADS": _threads(env.get("OMP_NUM_THREADS"), self.threads),
                "OMP_WAIT_POLICY": "PASSIVE",  # trainer and servers share the cores: waiting threads must not spin
                "SGLANG_CPU_OMP_THREADS_BIND": _cores_of_ranks(self.arguments["tp_size"], self.arguments.get("nnodes", 1)),
                "PYTHONPATH": os.pathsep.join([str(STUBS), *filter(None, [env.get("PYTHONPATH")])]),
            }
        return env


@dataclass(frozen=True)
class Site:
    """A machine that servers run on, as it sees itself: its address, its cores, a folder with the model's config.json."""

    cfg: Config
    scratch: Path
    host: str
    threads: int

    @staticmethod
    def here(cfg: Config, scratch: Path, *, ranks: int, host: str | None = None) -> Site:
        """This machine, which `ranks` of all its servers share; UserError when it does not have `cluster.interface`. `host`: the
        address, where it is known."""
        write_model_folder(cfg.model, PrecisionPlan.build(cfg.model, cfg.precision, "rollout"), scratch / "model")
        return Site(cfg, scratch, host or listen_address(cfg.cluster), threads_per_rank(ranks))

    def server(self, order: EngineOrder, device: int) -> Server:
        """`device`: the first of its GPUs, as an index among those that are visible here."""
        model = str(self.scratch / "model")
        arguments = {**order.arguments, "model_path": model}
        if self.cfg.speculative.method == Drafting.mtp:
            arguments["speculative_draft_model_path"] = model
        if not on_cpu(self.cfg):
            arguments["base_gpu_id"] = device
        return Server(
            order.index,
            arguments,
            host=self.host,
            api_key=order.api_key,
            log=order.log,
            threads=self.threads,
            variables=cpu_matmul.environment(self.cfg.precision.cpu_matmul) if on_cpu(self.cfg) else {},
            scratch=self.scratch,
        )


def _threads(wanted: str | None, share: int) -> str:
    """A server's share of this machine's cores, or fewer where the user wants fewer."""
    first = (wanted or "").partition(",")[0]
    return str(min(int(first), share) if first.isdecimal() and int(first) else share)


def threads_per_rank(ranks: int) -> int:
    """CPU threads of each rank of a server when `ranks` of all servers share this machine."""
    return max(1, available_cores() // ranks)


def _cores_of_ranks(ranks: int, nodes: int) -> str:
    """Cores by rank of this node in SGLang's notation; "all" for a server of one rank. Without it, SGLang wants a NUMA node for
    every rank of a server, other nodes' included."""
    if ranks == 1:
        return "all"
    ranks //= nodes
    cores = sorted(os.sched_getaffinity(0))  # SGLang's CPU engine exists on Linux only
    return "|".join(",".join(map(str, cores[rank::ranks] or cores)) for rank in range(ranks))
