"""Routes that lie where they were decoded: the driver holds a reference, and a rank fetches the rows of its own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Held(Protocol):
    """An array on some node."""

    def fetch(self) -> torch.Tensor:
        """The routes [rows, L, K], compact; a copy on this node that the caller may not write into."""


@dataclass(frozen=True)
class RouteRef:
    """In place of `Sample.routes`. `parts` follow each other in rows; `rows` of all of them together."""

    parts: tuple[Held, ...]
    rows: int

    def __len__(self) -> int:
        return self.rows

    def fetch(self) -> torch.Tensor:
        """[rows, L, K] of all parts."""
        arrays = [part.fetch() for part in self.parts]
        return arrays[0] if len(arrays) == 1 else torch.cat(arrays)


def joined(parts: Sequence[torch.Tensor | RouteRef]) -> Any:
    """Pieces of one sample's routes as one: a tensor, or a RouteRef where they are not here."""
    if parts and all(isinstance(part, RouteRef) for part in parts):
        references = [part for part in parts if isinstance(part, RouteRef)]
        return RouteRef(tuple(held for part in references for held in part.parts), sum(map(len, references)))
    return torch.cat([part.fetch() if isinstance(part, RouteRef) else part for part in parts])


def here(routes: torch.Tensor | RouteRef | None) -> torch.Tensor | None:
    """The tensor, fetched where it is a reference."""
    return routes.fetch() if isinstance(routes, RouteRef) else routes
