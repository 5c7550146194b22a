"""A rank's part in publishing weights on every node: it writes what it owns, and its rail carries that to the other nodes.

A rail is one rank of every node, those with the same device index. First every rank writes its own part into its node's memory,
and only then rails broadcast files, one after the other: a collective between two of the export's own could wait for ever. No
rank holds more than the part that it owns and a chunk, and a node exactly one copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from runner.cluster.placement import Placement
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.weights.place import ROOT
from runner.weights.published import Published, differing, read_back, sum_of
from runner.weights.stream import wire_bytes
from runner.weights.weight_set import WeightSet, WeightWriter

CHUNK_BYTES = 64 << 20


def rails(placed: Placement) -> list[list[int]]:
    """Ranks of every rail, a rank of each node. Where a node has fewer ranks than another, some are in several rails."""
    nodes = [[place.rank for place in node.ranks] for node in placed.nodes if node.ranks]
    longest = max(map(len, nodes))
    return [sorted({ranks[rail % len(ranks)] for ranks in nodes}) for rail in range(longest)]


class Publisher:
    """Of one rank. Building it is collective, and so is `publish`."""

    def __init__(self, placed: Placement, device: torch.device, *, everywhere: bool) -> None:
        """`everywhere`: on every node that has ranks; else each part on its owner's node alone."""
        self.root, self.rank, self.device = Path(os.environ[ROOT]), dist.get_rank(), device
        self.mine = {place.rank: place.device for _, place in placed.ranks()}
        self.rails = [(ranks, dist.new_group(ranks)) for ranks in (rails(placed) if everywhere else [])]
        # by process: the sets of ranks that were lost stay for servers that start again before the next sync
        self.writer = WeightWriter(self.root / f"rank_{self.rank:04d}_{os.getpid()}", durable=False)
        self.previous: list[WeightSet] = []

    def publish(self, stream: Iterable[ExportedTensor]) -> Published:
        """Write this rank's tensors, and bring them to every other node. UserError when a node's memory is full."""
        written, sizes = self._write(stream)
        files = {self.rank: [str(path.relative_to(self.root)) for path in written.files]}
        for rail, (ranks, group) in enumerate(self.rails):
            if self.rank in ranks:
                for source in ranks:
                    if self.mine[source] == rail:
                        files[source] = self._carry(source, files.get(self.rank, []), group)
        sums = {source: sum_of(read_back(self.root / name for name in names)) for source, names in files.items()}
        self._problem_everywhere("")
        location = {part: str(path.relative_to(self.root)) for part, path in written.location.items()}
        return Published(
            self.rank, files[self.rank], written.digests, written.parts, written.formats, sizes, location, written.changes, sums,
            written.problems,
        )  # fmt: skip

    def compare(self, owner: int, digests: dict[str, str], files: list[str]) -> list[str]:
        """Parts of `owner` whose copy on this node has other bytes."""
        return differing(digests, read_back(self.root / name for name in files))

    def _write(self, stream: Iterable[ExportedTensor]) -> tuple[WeightSet, dict[str, int]]:
        self.previous = [one for one in self.previous if one.folder.is_dir()]  # a dropped one is gone
        sizes: dict[str, int] = {}

        def measured() -> Iterable[ExportedTensor]:
            for item in stream:
                sizes[item.name] = wire_bytes(item)
                yield item

        problem, written = "", WeightSet(0, Path())
        try:
            written = self.writer.write(0, measured(), self.previous[-1] if self.previous else None)
        except UserError as error:
            problem = f"{error.problem} (rank {self.rank})"
        self._problem_everywhere(problem)
        if written.files:
            self.previous.append(written)
        else:
            written.remove()
        return written, sizes

    def _problem_everywhere(self, problem: str) -> None:
        """All ranks raise when one cannot go on: the others would wait for it."""
        found: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(found, problem)
        for text in filter(None, found):
            raise UserError(text, key="rollout.weight_transport", fix="nodes with more shared memory: `plan` counts it")

    def _carry(self, source: int, own: list[str], group: dist.ProcessGroup) -> list[str]:
        """`source`'s files to every node of its rail; their names."""
        files = [(name, (self.root / name).stat().st_size) for name in own] if self.rank == source else []
        told = [files]
        dist.broadcast_object_list(told, src=source, group=group, device=self.device)
        for name, size in told[0]:
            self._copy(self.root / name, size, source, group)
        return [name for name, _ in told[0]]

    def _copy(self, path: Path, size: int, source: int, group: dist.ProcessGroup) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("rb" if self.rank == source else "wb") as file:
            for start in range(0, size, CHUNK_BYTES):
                chunk = torch.empty(min(CHUNK_BYTES, size - start), dtype=torch.uint8)
                if self.rank == source:
                    file.readinto(chunk.numpy())  # type: ignore[attr-defined]
                on_device = chunk.to(self.device)
                dist.broadcast(on_device, src=source, group=group)
                if self.rank != source:
                    file.write(on_device.cpu().numpy().data)
        if self.rank != source:
            path.chmod(0o600)
