"""Half a decoder layer per call."""

from __future__ import annotations

import numpy as np

from runner.rollout.local.cpu_kernels.attention import add_norm, attend
from runner.rollout.local.cpu_kernels.cache import compiled
from runner.rollout.local.cpu_kernels.experts import ROW_BLOCK, STACKED_WASTE, expert_layout, gate_activation, route, spread
from runner.rollout.local.cpu_kernels.matmul import expert_products, product


@compiled
def attention_block(
    hidden, added, place, share, first_norm, epsilon, normed, qkv, qkv_weights, qkv_group, query_norm, key_norm, cos, sin,
    slot, position, scale, keys, values, seen, output_weights, output_group, mixed, second_norm,
):  # fmt: skip
    """The first half of a layer: hidden [N, H] gets what the layer before adds, then attention's output; normed [M, H] becomes
    the mlp's input. N = len(slot) tokens; normed, qkv, seen and mixed have M >= N rows. Returns 0 when torch computed it."""
    count, rows = len(slot), len(normed)
    heads, groups, size = seen.shape[1] // keys.shape[3], keys.shape[1], keys.shape[3]
    add_norm(hidden, added, place, share, first_norm, epsilon, normed)
    failed = product(normed, rows, qkv_weights, qkv_group, qkv)
    split = qkv.reshape(rows, heads + 2 * groups, 2, size // 2)
    attend(split, query_norm, key_norm, epsilon, cos, sin, slot, position, scale, keys, values, seen.reshape(rows, heads, size))
    failed |= product(seen, rows, output_weights, output_group, mixed)
    one_place, one_share = np.empty((count, 1), np.int64), np.ones((count, 1), np.float32)
    for t in range(count):
        one_place[t, 0] = t
    add_norm(hidden, mixed, one_place, one_share, second_norm, epsilon, normed)
    return failed


@compiled
def expert_block(
    normed, gate, normalize, index, share, place, rows, both, inner, added,
    up_weights, up_group, up_stacked, down_weights, down_group, down_stacked,
):  # fmt: skip
    """The experts of a layer: index, share, place [N, K] as `route` and `spread` make them; added [P, H] rows of all experts.

    rows, both, inner and added have room for `room_for_experts` rows. Returns 0 when torch computed it.
    """
    experts = len(gate)
    counts, sizes, first = np.empty(experts, np.int64), np.empty(experts, np.int64), np.empty(experts, np.int64)
    route(normed, gate, normalize, index, share, place, counts)
    total = expert_layout(counts, up_stacked, sizes, first)
    spread(normed, index, first, place, rows)
    failed = expert_products(rows, first, sizes, up_weights, up_stacked, up_group, both)
    gate_activation(both[:total], inner[:total])
    return failed | expert_products(inner, first, sizes, down_weights, down_stacked, down_group, added)


def room_for_experts(pairs: int, experts: int) -> int:
    """Rows that `expert_layout` may ask for."""
    return STACKED_WASTE * max(pairs, ROW_BLOCK * experts)


@compiled
def dense_block(normed, gate_up_weights, gate_up_group, both, inner, down_weights, down_group, added):
    """A dense mlp: normed [M, H] -> added [M, H]. Returns 0 when torch computed it."""
    failed = product(normed, len(normed), gate_up_weights, gate_up_group, both)
    gate_activation(both, inner)
    return failed | product(inner, len(normed), down_weights, down_group, added)
