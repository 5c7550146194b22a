"""Weights as files that engines map: in shared memory of one host (`tensor`), or on a disk that engines share (`disk_full`)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from runner.errors import UserError
from runner.weights.transports.base import KEY, Ask, Offer, Rank, Site, Transport, Writer, WritesSets, in_shared_memory, register

if TYPE_CHECKING:
    import torch

    from runner.config.schema import Config
    from runner.data import ExportedTensor
    from runner.weights.stream import SealedTensor
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

        from runner.weights.place import ROOT

        here = Path(os.environ.get(ROOT, "/"))  # of files that were published on every node; others have absolute names
        for path in offer["files"]:
            with safe_open(here / path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if wanted(name):
                        yield name, opened.get_tensor(name)


class Tensor(Files):
    """No CUDA IPC (docs/gpus.md says why): the copy in host memory also serves retries, checks and engines that start again."""

    name, where = "tensor", " into the host's shared memory"
    on_every_node = True

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

    def write(self, version: int, stream: Iterable[ExportedTensor | SealedTensor], previous: WeightSet | None) -> WeightSet:
        """Nothing is written of a stream that was published on every node."""
        from runner.weights.published import PublishedTensor, collect

        items = iter(stream)
        first = next(items, None)
        if isinstance(first, PublishedTensor):
            return collect(version, cast("Iterable[PublishedTensor]", itertools.chain([first], items)))
        return super().write(version, itertools.chain([] if first is None else [first], items), previous)

    async def carry(self, weights: WeightSet, names: list[str], engines: int, ranks: int, ask: Ask) -> str:
        files = [str(file) for file in weights.files]
        await ask(lambda place: {"files": files})
        return ""


register(Tensor())
register(DiskFull())
