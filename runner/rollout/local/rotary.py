"""Rotary angles of every position, computed once by a decoder's own module and then looked up."""

from __future__ import annotations

from typing import Any

import torch

# cos and sin, [..., d] each; or, of a module that rotates complex numbers (DeepSeek-V2), these, [..., d / 2]
Angles = tuple[torch.Tensor, torch.Tensor] | torch.Tensor
EVERY = ""  # the kind of layers whose decoder has one kind only


class Rotary:
    """`kinds`: of each layer of the decoder, those that share angles; Gemma 3's layers with a window have a base of their own."""

    def __init__(self, decoder: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.dtype, self.device = decoder.rotary_emb, dtype, device
        own = hasattr(self.module, "layer_types")
        self.kinds = [layer.self_attn.layer_type if own else EVERY for layer in decoder.layers]
        self._tables: dict[str, Angles] = {}

    def compute(self, positions: torch.Tensor, kind: str = EVERY) -> Angles:
        """Of positions [..., T] as the module takes them, batch first."""
        sample = torch.empty(1, dtype=self.dtype, device=self.device)
        angles: Angles = self.module(sample, positions, kind) if kind else self.module(sample, positions)
        return angles

    def table(self, length: int, kind: str = EVERY) -> Angles:
        """Of all positions up to at least `length`, [length, ...]."""
        found = self._tables.get(kind)
        if found is None or _first(found).shape[0] < length:
            angles = self.compute(torch.arange(length, device=self.device).unsqueeze(0), kind)
            found = self._tables[kind] = _each(angles, lambda part: part.reshape(-1, part.shape[-1]))
        return found

    def at(self, positions: torch.Tensor, length: int) -> dict[str, Angles]:
        """Kind of layers -> angles [N, 1, ...] of tokens at positions [N], all below `length`."""
        return {kind: _each(self.table(length, kind), lambda part: part[positions].unsqueeze(1)) for kind in set(self.kinds)}


def _first(angles: Angles) -> torch.Tensor:
    return angles if isinstance(angles, torch.Tensor) else angles[0]


def _each(angles: Angles, change: Any) -> Angles:
    return change(angles) if isinstance(angles, torch.Tensor) else (change(angles[0]), change(angles[1]))
