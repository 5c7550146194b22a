"""What a way of bringing weights to engines consists of. Imports no torch: rules, preflight and planner ask as well.

One file of this folder holds one way completely: what it moves, what keeps it from working, the driver's half and the engine's
half. The halves import torch when they are asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runner.config.choices import TransferProtocol
from runner.errors import UserError

if TYPE_CHECKING:
    import torch

    from runner.config.schema import Config
    from runner.data import ExportedTensor
    from runner.weights.stream import SealedTensor
    from runner.weights.weight_set import WeightSet, WeightWriter

KEY = "rollout.weight_transport"
Offer = dict[str, Any]  # JSON: what the engine's half must know to receive
# Asks every engine, given its place among them, to receive by an offer; whether all of them took the weights.
Ask = Callable[[Callable[[int], Offer]], Awaitable[bool]]


@dataclass(frozen=True)
class Site:
    """Where the driver's half works. `host`: this machine's address that engines reach; `interface`: the name of that network
    interface; `disk`: a folder of the run's own for weights; `needed_bytes`: of one whole set."""

    host: str
    interface: str
    on_gpus: bool
    disk: Path
    logs: Path
    needed_bytes: int
    transfer_protocol: TransferProtocol
    transfer_devices: Sequence[str]


@dataclass(frozen=True)
class Rank:
    """One process of an engine, as the engine's half sees it. `group`: the process group of all ranks of the engine; None where
    there is one. `is_draft`: the draft model asks, after the target in the same process has received."""

    host: str
    device: torch.device
    rank: int
    group: Any
    is_draft: bool


class Driver(Protocol):
    """The driver's half: writes a version once and brings it to engines as often as they ask for it."""

    @property
    def transport(self) -> str:
        """The name of the transport whose engine half receives."""

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        """The whole set of this version. UserError when there is no room for it."""

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        """Bring the named parts to `engines` engines of `ranks` ranks while `ask` runs; "" or what went wrong for all of them."""

    def close(self) -> None:
        """Removes what was written."""


class Transport:
    """One way, as the config names it. Has no state."""

    name: str
    kept_by_ranks = False  # under cluster=ray the trainer's ranks write it, each on its own node, and send it themselves
    on_every_node = False  # under cluster=ray the trainer's ranks write it on every node, and engines read what theirs has

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        """(bytes that one sync of `stream` bytes moves, over which path and by which formula); `ranks` of all engines."""
        raise NotImplementedError

    def problems(self, cfg: Config) -> Iterator[UserError]:
        """What in the config it cannot go together with."""
        yield from ()

    def obstacles(self, cfg: Config) -> Iterator[UserError]:
        """What this machine lacks for it."""
        yield from ()

    def warnings(self, cfg: Config) -> Iterator[str]:
        """What whoever chooses it should know."""
        yield from ()

    def driver(self, site: Site) -> Driver:
        """The driver's half. UserError where it does not start."""
        raise NotImplementedError

    def receive(self, offer: Offer, rank: Rank, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """The engine's half: (part name, tensor) of the offered parts that are wanted."""
        raise NotImplementedError


class Writer(Protocol):
    """Writes sets under `root`."""

    root: Path

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet: ...

    def close(self) -> None: ...


class WritesSets:
    """What all drivers share that send out of one writer's sets."""

    transport = ""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        return self.writer.write(version, stream, previous)

    def close(self) -> None:
        self.writer.close()


TRANSPORTS: dict[str, Transport] = {}


def register(transport: Transport) -> None:
    TRANSPORTS[transport.name] = transport


def in_shared_memory(site: Site) -> WeightWriter:
    """A writer of sets in shared memory, or in the temporary folder where that is too small."""
    from runner.weights.place import shared_memory_folder
    from runner.weights.weight_set import WeightWriter

    return WeightWriter(shared_memory_folder(site.needed_bytes), durable=False)
