"""Routes that lie where they were decoded: the driver holds a reference, and a rank fetches the rows of its own tokens.

Shape legend: L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch


class Held(Protocol):
    """An array on some node."""

    def array(self) -> np.ndarray:
        """The routes [rows, L, K], compact, as they lie on this node after this call; nobody may write into them."""


@dataclass(frozen=True)
class Part:
    """Rows [0, rows) of what is held."""

    held: Held
    rows: int


@dataclass(frozen=True)
class RouteRef:
    """In place of `Sample.routes`: parts that follow each other in rows, one for every answer of an engine."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def head(self, rows: int) -> RouteRef:
        """Its first rows."""
        kept: list[Part] = []
        for part in self.parts:
            if rows > 0:
                kept.append(replace(part, rows=min(part.rows, rows)))
                rows -= part.rows
        return RouteRef(tuple(kept))

    def fetch(self) -> torch.Tensor:
        """[rows, L, K] of all parts, a copy."""
        arrays = [part.held.array()[: part.rows] for part in self.parts]
        return torch.from_numpy(np.concatenate(arrays))

    def pick(self, rows: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
        """[N, layers, K] of rows [N] int64 and these of the layers, a copy: no other row leaves the place where it lies."""
        begin, pieces, places = 0, [], []
        for part in self.parts:
            inside = ((rows >= begin) & (rows < begin + part.rows)).nonzero().squeeze(1)
            if len(inside):
                pieces.append(_picked(part.held.array(), rows[inside] - begin, layers))
                places.append(inside)
            begin += part.rows
        return torch.from_numpy(np.concatenate(pieces)[torch.cat(places).argsort().numpy()])


def joined(parts: Sequence[torch.Tensor | RouteRef]) -> Any:
    """Pieces of one sample's routes as one: a tensor, or a RouteRef where they are not here."""
    if parts and all(isinstance(part, RouteRef) for part in parts):
        return RouteRef(tuple(held for part in parts if isinstance(part, RouteRef) for held in part.parts))
    return torch.cat([part.fetch() if isinstance(part, RouteRef) else part for part in parts])


def head(routes: torch.Tensor | RouteRef, rows: int) -> torch.Tensor | RouteRef:
    """The first rows, wherever they are."""
    return routes.head(rows) if isinstance(routes, RouteRef) else routes[:rows]


def pick(routes: torch.Tensor | RouteRef, rows: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """[N, layers, K] of rows [N] int64, fetched where they are not here."""
    if isinstance(routes, RouteRef):
        return routes.pick(rows, layers)
    return torch.from_numpy(_picked(routes.numpy(), rows, layers))


def _picked(array: np.ndarray, rows: torch.Tensor, layers: Sequence[int]) -> np.ndarray:
    """A copy. By numpy: torch indexes no uint16."""
    return array[rows.numpy()[:, None], np.asarray(layers)]


def here(routes: torch.Tensor | RouteRef | None) -> torch.Tensor | None:
    """The tensor, fetched where it is a reference."""
    return routes.fetch() if isinstance(routes, RouteRef) else routes
