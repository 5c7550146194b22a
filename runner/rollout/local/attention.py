"""The slot-based KV cache and the attention function that transformers' modules call.

Shape legend: N tokens of this forward (all sequences, flat), B rows (sequences), S most new tokens of a row,
C cached positions that are read, h query heads, n key-value heads, g = h / n, d head size.

Modules run on hidden states [N, 1, H], so they hand over query [N, h, 1, d]. A row's cache is one slot; running rows
fill slots 0 .. B-1 without a hole, so that reading the cache is a slice and never a gather.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "runner_slots"
LENGTH_BUCKET = 16  # cache positions are read in multiples of this


class KVCache:
    """Keys and values per layer, [slots, n, length, d] each; made when a layer first writes, so any head size fits.

    `dtype` may be float8_e4m3fn (scale 1): values are cast when they are written and when they are read.
    """

    def __init__(self, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots, self.length, self.dtype, self.device = slots, length, dtype, device
        self.layers: dict[tuple[int, str], torch.Tensor] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def places(self, index: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows [N n] of a layer's tensor, seen as [slots n length, d], of the tokens at (slot, position) = index [2, N]."""
        place = (index[0] * heads).unsqueeze(-1) + torch.arange(heads, device=self.device)
        return (place * self.length + index[1].unsqueeze(-1)).view(-1)

    def write(self, layer: int, kind: str, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """values [N, n, 1, d] of the tokens at these `places`; returns the layer's tensor."""
        key = (layer, kind)
        rows, heads, _, size = values.shape
        if key not in self.layers:
            self.layers[key] = torch.zeros(self.slots, heads, self.length, size, dtype=self.dtype, device=self.device)
        cache = self.layers[key]
        fresh = values.reshape(rows * heads, size)
        if self.dtype == torch.float8_e4m3fn:
            fresh = fresh.clamp(-448, 448).to(self.dtype).view(torch.uint8)
            cache.view(torch.uint8).view(-1, size).index_copy_(0, places, fresh)
        else:
            cache.view(-1, size).index_copy_(0, places, fresh)
        return cache

    def blocked(self, layer: int, heads: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys [slots, n, length / 16, d, 16] and values [slots, n, length, d] for the CPU kernels, bf16 as uint16."""
        if layer not in self._arrays:
            if (layer, "key blocks") not in self.layers:
                blocks = self.length // LENGTH_BUCKET
                shape = (self.slots, heads, blocks, size, LENGTH_BUCKET)
                self.layers[layer, "key blocks"] = torch.zeros(shape, dtype=self.dtype)
                self.layers[layer, "value"] = torch.zeros(self.slots, heads, self.length, size, dtype=self.dtype)
            pair = self.layers[layer, "key blocks"], self.layers[layer, "value"]
            raw = [(tensor.view(torch.uint16) if self.dtype == torch.bfloat16 else tensor).numpy() for tensor in pair]
            self._arrays[layer] = raw[0], raw[1]
        return self._arrays[layer]

    def copy(self, source: torch.Tensor, target: torch.Tensor, length: int) -> None:
        """Slots `source` to slots `target` ([n] each), positions 0 .. length-1."""
        for (_, kind), cache in self.layers.items():
            raw = cache.view(torch.uint8) if self.dtype == torch.float8_e4m3fn else cache
            end = -(-length // LENGTH_BUCKET) if kind == "key blocks" else length
            raw[target, :, :end] = raw[source, :, :end]

    def keep(self, slot: int, length: int) -> dict[tuple[int, str], torch.Tensor]:
        """A copy of one slot's positions 0 .. length-1, for `put_back`."""
        return {key: self._positions(key, cache, slot, length).clone() for key, cache in self.layers.items()}

    def put_back(self, slot: int, kept: dict[tuple[int, str], torch.Tensor], length: int) -> None:
        """Positions 0 .. length-1 of what `keep` copied, into any slot."""
        for key, copied in kept.items():
            target = self._positions(key, self.layers[key], slot, length)
            target.copy_(copied[:, : target.shape[1]])

    def _positions(self, key: tuple[int, str], cache: torch.Tensor, slot: int, length: int) -> torch.Tensor:
        raw = cache.view(torch.uint8) if self.dtype == torch.float8_e4m3fn else cache
        return raw[slot, :, : -(-length // LENGTH_BUCKET) if key[1] == "key blocks" else length]

    def grow(self, length: int) -> None:
        """More positions per slot; contents stay."""
        if length <= self.length:
            return
        for key, cache in self.layers.items():
            end = length // LENGTH_BUCKET if key[1] == "key blocks" else length
            grown = torch.zeros(*cache.shape[:2], end, *cache.shape[3:], dtype=self.dtype, device=self.device)
            grown[:, :, : cache.shape[2]] = cache
            self.layers[key] = grown
        self.length = length
        self._arrays.clear()

    def clear(self) -> None:
        self.layers.clear()
        self._arrays.clear()

    @property
    def bytes(self) -> int:
        return sum(cache.numel() * cache.element_size() for cache in self.layers.values())


@dataclass
class Step:
    """One forward's places; tokens are sorted by row.

    slots         the rows' slots: a slice when they are neighbours (decoding), else an index [B] (prefill)
    write_index   [2, N] slots and positions of the new tokens
    pad_index     [N] places row * S + column in the padded [B, S] query, or None when every row has S tokens
    limit         [B, S] last cache position that a query sees (its own)
    reads         C
    """

    cache: KVCache
    slots: slice | torch.Tensor
    rows: int
    width: int
    write_index: torch.Tensor
    pad_index: torch.Tensor | None
    limit: torch.Tensor
    reads: int
    _masks: dict[tuple[int, torch.dtype, int], torch.Tensor] = field(default_factory=dict)
    _places: dict[int, torch.Tensor] = field(default_factory=dict)

    def places(self, heads: int) -> torch.Tensor:
        """Where the new tokens lie in the cache, the same for all layers of as many heads."""
        if heads not in self._places:
            self._places[heads] = self.cache.places(self.write_index, heads)
        return self._places[heads]

    def read(self, cache: torch.Tensor) -> torch.Tensor:
        """[B, n, C, d] of these rows: a view for neighbours, a copy otherwise."""
        if isinstance(self.slots, slice):
            return cache[self.slots, :, : self.reads]
        return cache[:, :, : self.reads].index_select(0, self.slots)

    def mask(self, groups: int, dtype: torch.dtype, window: int = 0) -> torch.Tensor:
        """Additive mask [B, 1, g * S, C], the same for all layers that see as far. `window`: positions that a query sees, its own
        included; 0: all before it."""
        key = (groups, dtype, window)
        if key not in self._masks:
            positions = torch.arange(self.reads, device=self.limit.device)
            seen = positions <= self.limit.unsqueeze(-1)
            if window:
                seen &= positions > self.limit.unsqueeze(-1) - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._masks[key] = mask.unsqueeze(1).repeat(1, 1, groups, 1)
        return self._masks[key]


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    engine_step: Step,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query [N, h, 1, d], key [N, n, 1, d], value [N, n, 1, d_v] -> output [N, 1, h, d_v]; writes the cache, then reads it.

    `s_aux` [h]: logits of attention sinks."""
    step, layer = engine_step, int(module.layer_idx)  # type: ignore[arg-type]
    places = step.places(key.shape[1])
    keys = step.cache.write(layer, "key", places, key)
    values = step.cache.write(layer, "value", places, value)
    tokens, heads, _, size = query.shape
    groups = heads // key.shape[1]
    keys_BnCd = step.read(keys)
    values_BnCd = step.read(values)
    if step.cache.dtype != query.dtype:
        keys_BnCd, values_BnCd = keys_BnCd.to(query.dtype), values_BnCd.to(query.dtype)
    flat = query.reshape(tokens, heads, size)
    if step.pad_index is not None:
        padded = flat.new_zeros(step.rows * step.width, heads, size)
        flat = padded.index_copy_(0, step.pad_index, flat)
    if step.width > 1:
        flat = flat.view(step.rows, step.width, heads, size).transpose(1, 2)
    grouped = flat.reshape(step.rows, key.shape[1], groups * step.width, size)
    mask = step.mask(groups, query.dtype, sliding_window or 0)
    if s_aux is None:
        output = F.scaled_dot_product_attention(grouped, keys_BnCd, values_BnCd, attn_mask=mask, scale=scaling)
    else:
        sinks = s_aux.view(-1, groups, 1).expand(-1, -1, step.width).reshape(1, -1, groups * step.width, 1)
        output = attention_with_sinks(grouped, keys_BnCd, values_BnCd, mask, scaling, sinks)
    output = output.reshape(step.rows, heads, step.width, -1)
    output = output.transpose(1, 2).reshape(step.rows * step.width, 1, heads, -1)
    return (output if step.pad_index is None else output.index_select(0, step.pad_index)), None


def attention_with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, sinks: torch.Tensor
) -> torch.Tensor:
    """[B, n, R, d], [B, n, C, d], [B, n, C, d_v], additive mask [B, 1, R, C], sinks [1, n, R, 1] -> [B, n, R, d_v].

    A sink is one more logit of the softmax, without a value: it takes a share of the weight away. In fp32; the scores
    [B, n, R, C] are written out.
    """
    scores = (query.float() * scale) @ key.float().transpose(2, 3) + mask
    logits = torch.cat([scores, sinks.float().expand(len(scores), -1, -1, -1)], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :-1]
    return (weights @ value.float()).to(query.dtype)


AttentionInterface.register(ATTENTION, slot_attention)
