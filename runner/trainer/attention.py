"""Attention for training: causal over right-padded batches, whole within an image; fp32 on a CPU, fused kernels on a GPU.

Shape legend: B samples, H query heads, G key-value heads, T tokens, D head width.

torch's CPU flash attention has a bf16 backward that takes 7 to 10 times as long as the same attention in fp32 (measured at
100 x 4 x 40 x 16). Queries, keys and values are therefore widened on a CPU; short sequences use plain matmuls
without repeating the key-value heads, longer ones torch's fused kernel, which keeps no [T, T] scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "runner_causal"
SINK_FEATURES = 8  # GPU kernels take heads whose width is a multiple
SHORT = 256  # tokens up to which [T, T] scores of all heads are cheaper than the fused kernel


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """[B, H, T, D], [B, G, T, D], [B, G, T, Dv] -> ([B, T, H, Dv], None). Without a mask attention is causal, as a module
    that says `is_causal` asks, or whole (a visual tower's); everything else goes to transformers' own function. With a
    `sliding_window` a token sees itself and the window - 1 before it: transformers makes no mask for a function of our own.
    `s_aux` [H]: logits of attention sinks."""
    if s_aux is not None:
        assert attention_mask is None and scaling is not None
        return attention_with_sinks(query, key, value, scaling, s_aux, sliding_window).transpose(1, 2).contiguous(), None
    if sliding_window and sliding_window < query.shape[2] and attention_mask is None:
        attention_mask = window_mask(query.shape[2], sliding_window, query.device)
    plain = attention_mask is None and query.shape[2] == key.shape[2]
    if query.device.type != "cpu" or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True))
    return plain_attention(query, key, value, scale, causal=causal).transpose(1, 2).contiguous(), None


def attention_with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, sinks: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Causal attention [B, H, T, D], [B, G, T, D], [B, G, T, Dv] -> [B, H, T, Dv] with one more logit in each softmax, which has
    no value: sinks [H]. In fp32 on a CPU.

    The sink is a key that is seen by every token. Its logit comes from one more feature, in which it alone is not zero, so that
    torch's fused kernels compute it and its gradient.
    """
    batch, heads, length, width = query.shape
    if query.device.type == "cpu":
        q, k, v = query.float(), key.float(), value.float()
    else:  # the kernel that takes a mask there shares no heads
        q, k, v = query, *(t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    more = SINK_FEATURES - width % SINK_FEATURES
    extra = torch.zeros(batch, heads, length, more, dtype=q.dtype, device=q.device)
    extra[..., 0] = (sinks.to(q.dtype) / scale).view(1, -1, 1)
    q = torch.cat([q, extra], dim=-1)
    k = nn.functional.pad(k, (0, more, 1, 0))
    k[:, :, 0, width] = 1
    values = v.shape[-1]
    v = nn.functional.pad(v, (0, q.shape[-1] - values, 1, 0))  # as wide as keys: the fused kernel wants that on a CPU
    seen = nn.functional.pad(window_mask(length, window or length, query.device), (1, 0), value=True)
    output = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return output[..., :values].to(query.dtype)


def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[1, 1, T, T] bool: True where a token (row) sees another."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)
    return seen[None, None]


def plain_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, H, T, D], [B, G, T, D], [B, G, T, Dv] -> [B, H, T, Dv] in the dtype of `query`, computed in fp32 (CPU)."""
    return plain_attention(query, key, value, scale, causal=True)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, causal: bool) -> torch.Tensor:
    """`plain_causal_attention`, or every token sees every token."""
    q, k, v = query.float(), key.float(), value.float()
    if query.shape[2] <= SHORT:
        output = _short(q, k, v, scale, causal)
    else:
        output = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
    return output.to(query.dtype)


def _short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    grouped = (q * scale).reshape(batch, groups, heads // groups * length, q.shape[-1])
    scores = (grouped @ k.transpose(2, 3)).view(batch, groups, heads // groups, length, length)
    if causal:
        scores = scores + torch.full((length, length), float("-inf"), device=q.device).triu(1)
    weights = torch.softmax(scores, dim=-1).view(batch, groups, heads // groups * length, length)
    return (weights @ v).view(batch, heads, length, v.shape[-1])


def register() -> str:
    """Make the function known to transformers; returns its name for `attn_implementation`."""
    AttentionInterface.register(NAME, causal_attention)
    return NAME
