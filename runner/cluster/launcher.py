"""Who starts a run's processes, and where: what the trainer and the pool ask of it. Torch-free, Ray-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runner.config.schema import Config


class Ranks(Protocol):
    """The trainer's rank processes. A dead, silent or raising rank ends all of them, and the call raises TrainerLost."""

    timeout: float  # seconds that a rank may be silent

    @property
    def pids(self) -> list[int]:
        """Process ids by rank, each on its own node."""

    def call(self, name: str, *args: Any) -> list[Any]:
        """`worker.name(*args)` on every rank -> their results, by rank. Raises TrainerLost, and UserError that a rank raised."""

    def each(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """As `call`, with arguments of its own for every rank. A rank is sent no other's; ranks that are given the same object
        get the same message."""

    def stream(self, name: str, *args: Any) -> Iterator[Any]:
        """The items of a generator method of all ranks, as they arrive."""

    def close(self) -> None:
        """End every rank; safe to call again."""


@dataclass(frozen=True)
class EngineOrder:
    """A server as the pool asks for it: what is the same on whichever node it runs. `arguments` of SGLang, without what the node
    decides: address, ports, devices, the folder of the model."""

    index: int
    arguments: dict[str, Any]
    api_key: str
    log: Path


class EngineProcess(Protocol):
    """One server, on whichever node."""

    index: int
    arguments: dict[str, Any]
    log: Path
    title: str

    @property
    def url(self) -> str:
        """Where it answers; known once it was started."""

    def client(self, session: Any, api_key: str, *seconds: float) -> Any:
        """Of the started server: a runner.rollout.sglang.client.Client."""

    def start(self) -> None:
        """Start the process; whether it answers is the client's to find out. May be called again after `kill`."""

    def alive(self) -> bool: ...

    def failure(self) -> str:
        """Why it ended."""

    def stop(self) -> None:
        """Ask, wait, then kill the process and all it started."""

    def kill(self) -> None:
        """Returns when the process is gone."""


class Launcher(Protocol):
    """One of `cluster`'s."""

    publishes: bool  # the trainer's ranks write the rollout's weights on nodes, instead of streaming them to the driver

    def host(self, cfg: Config) -> str:
        """The driver's address, where the processes of every node reach it."""

    def ranks(self, cfg: Config, run_dir: Path | None) -> Ranks:
        """Start the trainer's ranks, as `placement` has them; returns when all have built their model."""

    def engines(self, cfg: Config, orders: list[EngineOrder], scratch: Path) -> list[EngineProcess]:
        """Servers that have not been started yet. `scratch`: a folder of this machine, removed by whoever made it."""

    def forget_weights(self, folders: list[str]) -> None:
        """Remove these folders of published weights on every node."""

    def close(self) -> None:
        """End everything that was started."""
