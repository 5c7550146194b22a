"""Weights as files that engines map: in shared memory of one host (`tensor`), or on a disk that engines share (`disk_full`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from runner.errors import UserError
from runner.weights.transports.base import KEY, Ask, Offer, Rank, Site, Transport, Writer, WritesSets, in_shared_memory, register

if TYPE_CHECKING:
    import torch

    from runner.config.schema import Config
    from runner.weights.weight_set import WeightSet, WeightWriter


class Files(Transport):
    """Reads whole files, whoever wrote them where."""

    where: str

    def traffic(self, stream: int, engines: int, ranks: int) -> tuple[int, str]:
        return stream * (1 + engines), f"written once{self.where}, read by {engines} engines"

    def driver(self, site: Site) -> FilesDriver:
        return FilesDriver(self.name, self.writer(site))

    def writer(self, site: Site) -> WeightWriter:
        raise NotImplementedError

    def receive(self, offer: Offer, rank: Rank, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        for path in offer["files"]:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if wanted(name):
                        yield name, opened.get_tensor(name)


class Tensor(Files):
    """No CUDA IPC: the copy in host memory also serves engines that start again."""

    name, where = "tensor", " into the host's shared memory"

    def problems(self, cfg: Config) -> Iterator[UserError]:
        if not cfg.parallelism.colocate:
            yield UserError(
                "weight_transport=tensor goes through the memory of one host, where trainer and engines share its GPUs",
                key=KEY,
                fix=f"{KEY}=distributed",
            )

    def writer(self, site: Site) -> WeightWriter:
        return in_shared_memory(site)


class DiskFull(Files):
    name, where = "disk_full", ""

    def writer(self, site: Site) -> WeightWriter:
        from runner.weights.weight_set import WeightWriter

        return WeightWriter(site.disk, durable=True)


class FilesDriver(WritesSets):
    def __init__(self, transport: str, writer: Writer) -> None:
        super().__init__(writer)
        self.transport = transport

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        files = [str(file) for file in weights.files]
        await ask(lambda place: {"files": files})
        return ""


register(Tensor())
register(DiskFull())
