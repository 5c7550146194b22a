"""Bits of tensors: whether two are the same, and how many values differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import xxhash


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes (so -0.0 differs from 0.0 and a NaN equals itself)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(as_bytes(a), as_bytes(b.to(a.device)))


def digest_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, shapes, dtypes and bytes, in this order."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(as_bytes(tensor).cpu().numpy().data)
    return digest.hexdigest()


def changed(old: torch.Tensor, new: torch.Tensor, bits: int) -> tuple[int, int]:
    """(values that differ, values) of two tensors that hold `bits`-bit values; 4-bit values are nibbles of any layout."""
    a, b = as_bytes(old), as_bytes(new)
    if bits == 4:
        differing = a ^ b
        count = torch.count_nonzero(differing & 15) + torch.count_nonzero(differing & 240)
        return int(count), 2 * a.numel()
    width = max(bits // 8, 1)
    return int(torch.count_nonzero((a != b).view(-1, width).any(-1))), a.numel() // width


@dataclass
class Changes:
    """Values of quantized tensors that differ from those of the version before, by kind: [different, all]."""

    integers: list[int] = field(default_factory=lambda: [0, 0])
    scales: list[int] = field(default_factory=lambda: [0, 0])

    def count(self, kind: str, old: torch.Tensor, new: torch.Tensor, bits: int) -> None:
        """`kind`: "integers" or "scales"."""
        counts = getattr(self, kind)
        for place, number in enumerate(changed(old, new, bits)):
            counts[place] += number

    def share(self, kind: str) -> float | None:
        """Values of a kind that changed, 0 to 1; None where there are none."""
        different, total = getattr(self, kind)
        return different / total if total else None
