"""Many tensors as one run of bytes: what lies in a bucket, and the tensors again. Imports torch only where it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """One tensor inside a bucket."""

    name: str
    dtype: str
    shape: list[int]

    def bytes(self) -> int:
        import torch

        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def describe(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Piece]:
    return [Piece(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in tensors]


def pack(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """[bytes] uint8 on `device`, one tensor after the other."""
    import torch

    return torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(device) for tensor in tensors])


def unpack(flat: torch.Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of [bytes] uint8, in its order. Copies: slices at odd offsets cannot be viewed in a wider dtype."""
    import torch

    start = 0
    for piece in pieces:
        stop = start + piece.bytes()
        yield piece.name, flat[start:stop].clone().view(getattr(torch, piece.dtype)).view(piece.shape)
        start = stop
