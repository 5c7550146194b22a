"""Weights that the trainer's ranks wrote on every node themselves: the driver sees names and digests, never the tensors.

Paths are the same below every node's own folder, which the servers of a node find in their environment (ROOT).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from runner.weights.bits import Changes
from runner.weights.stream import digest
from runner.weights.weight_set import WeightSet


@dataclass(frozen=True)
class Published:
    """What one rank published: its own part of a version. Paths are relative to ROOT.

    files    of this rank's part
    digests  part name -> hash, by the rank that owns it
    sums     rank -> hash over the digests of its part as they were read back on this rank's node
    """

    rank: int
    files: list[str]
    digests: dict[str, str]
    parts: dict[str, list[str]]
    formats: dict[str, str]
    sizes: dict[str, int]  # weight name -> bytes of its parts
    location: dict[str, str]  # part name -> file
    changes: Changes
    sums: dict[int, str]
    problems: list[str]


Send = Callable[[Mapping[int, Any]], list[str]]  # orders by rank -> what went wrong, by rank (transports/ranks.py)


@dataclass(frozen=True)
class Session:
    """One version over all nodes. `drop` removes its files everywhere; `send` has ranks send parts of it, each by its order: what
    went wrong, by rank."""

    name: str
    changes: Changes
    problems: list[str]
    files: list[str]
    drop: Callable[[], None]
    send: Send


@dataclass(frozen=True)
class PublishedTensor:
    """In place of an exported tensor in a weight stream: it is on nodes already, on that of the rank that owns it at least.
    `size`: bytes of its parts."""

    name: str
    owner: int
    format: str
    parts: list[str]
    digests: dict[str, str]
    size: int
    location: dict[str, str]
    session: Session


@dataclass
class PublishedSet(WeightSet):
    """A version that lies on nodes; `folder` and files are relative to ROOT there. `owners`: part name -> rank that wrote it."""

    drop: Callable[[], None] = field(default=lambda: None)
    send: Send = field(default=lambda orders: [])
    owners: dict[str, int] = field(default_factory=dict)

    def remove(self) -> None:
        self.drop()


def collect(version: int, stream: Iterable[PublishedTensor]) -> PublishedSet:
    """The set of a published stream. A tensor that arrived twice, and what went wrong on a node, are its problems."""
    made = PublishedSet(version, Path())
    for item in stream:
        if not made.files:
            session = item.session
            files, folder = [Path(file) for file in session.files], Path(session.name)
            made = PublishedSet(
                version, folder, files, changes=session.changes, problems=list(session.problems), drop=session.drop,
                send=session.send,
            )  # fmt: skip
        if item.name in made.parts:
            made.problems.append(f"{item.name}: arrived twice in one session")
            continue
        made.parts[item.name], made.formats[item.name] = item.parts, item.format
        made.digests |= item.digests
        made.location |= {part: Path(file) for part, file in item.location.items()}
        made.owners |= dict.fromkeys(item.parts, item.owner)
        made.wire_bytes += item.size
    return made


def tensors(found: list[Published], session: Session) -> Iterable[PublishedTensor]:
    """The items of a weight stream, of every rank's part."""
    for part in found:
        for name, parts in part.parts.items():
            digests, location = ({p: table[p] for p in parts} for table in (part.digests, part.location))
            yield PublishedTensor(name, part.rank, part.formats[name], parts, digests, part.sizes[name], location, session)


def merged(found: list[Published]) -> tuple[Changes, list[str]]:
    """(changes over all ranks' parts, problems: copies that differ from what their owner wrote)."""
    changes, problems = Changes(), []
    owned = {part.rank: sum_of(part.digests) for part in found}
    for part in found:
        for kind in ("integers", "scales"):
            for place, count in enumerate(getattr(part.changes, kind)):
                getattr(changes, kind)[place] += count
        problems += part.problems
        for owner, copy in part.sums.items():
            if copy != owned[owner]:
                problems.append(f"rank {part.rank}'s node has other bytes of rank {owner}'s weights than it wrote")
    return changes, problems


def sum_of(digests: dict[str, str]) -> str:
    """One hash over many, whatever their order."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        state.update(f"{name}={digests[name]}\n".encode())
    return state.hexdigest()


def read_back(files: Iterable[Path]) -> dict[str, str]:
    """Part name -> hash of what these files hold."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                found[name] = digest(opened.get_tensor(name))
    return found


def differing(owned: dict[str, str], copy: dict[str, str]) -> list[str]:
    """Names of parts whose hashes are not the same in both."""
    return sorted(name for name in owned.keys() | copy.keys() if owned.get(name) != copy.get(name))
