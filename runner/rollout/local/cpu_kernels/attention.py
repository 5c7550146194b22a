"""Attention over the slots' caches, and the norm before every block."""

from __future__ import annotations

import numpy as np

from runner.rollout.local.cpu_kernels.cache import compiled
from runner.rollout.local.cpu_kernels.lanes import LANES, NEVER, accumulate, block_exp, block_max, narrow, rounded, wide


@compiled
def add_norm(hidden, outputs, place, share, weight, epsilon, normed):
    """hidden [N, H] += sum over k of share [N, K] * outputs[place [N, K]]; normed [N, H] = RMSNorm(hidden) * weight [H].

    outputs [P, H] are the rows of the experts in any order (K = 1 and share 1 for a plain residual, K = 0 for none).
    """
    size = hidden.shape[1]
    total = np.empty(size, np.float32)
    for t in range(hidden.shape[0]):
        row, out = hidden[t], normed[t]
        for i in range(size):
            total[i] = np.float32(0.0)
        for k in range(place.shape[1]):
            source, factor = outputs[place[t, k]], share[t, k]
            for i in range(size):
                total[i] += rounded(factor * wide(source[i]), hidden)
        squares = np.float32(0.0)
        for i in range(size):
            value = rounded(wide(row[i]) + rounded(total[i], hidden), hidden)
            row[i] = narrow(value, hidden)
            total[i] = value
            squares += value * value
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + epsilon)
        for i in range(size):
            out[i] = narrow(rounded(total[i] * scale, normed) * wide(weight[i]), normed)


@compiled
def _norm_rope(source, t, head, weight, epsilon, cos, sin, p, out):
    """One head: source[t, head] [2, d / 2], RMSNorm, rotation by halves at position p -> out[head] [2, d / 2] float32."""
    half = source.shape[3]
    squares = np.float32(0.0)
    for c in range(2):
        for i in range(half):
            value = wide(source[t, head, c, i])
            out[head, c, i] = value
            squares += value * value
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(2 * half) + epsilon)
    for i in range(half):
        a = rounded(rounded(out[head, 0, i] * scale, source) * wide(weight[0, i]), source)
        b = rounded(rounded(out[head, 1, i] * scale, source) * wide(weight[1, i]), source)
        first = rounded(a * wide(cos[p, 0, i]), source) - rounded(b * wide(sin[p, 0, i]), source)
        second = rounded(b * wide(cos[p, 1, i]), source) + rounded(a * wide(sin[p, 1, i]), source)
        out[head, 0, i], out[head, 1, i] = rounded(first, source), rounded(second, source)


@compiled
def attend(qkv, query_norm, key_norm, epsilon, cos, sin, slot, position, scale, keys, values, out):
    """Causal attention of N tokens over their slots' caches, after writing their own keys and values there.

    qkv [M, h + 2 n, 2, d / 2], M >= N, normed by query_norm and key_norm [2, d / 2], rotated by cos, sin [positions, 2, d / 2];
    slot, position [N]; keys [slots, n, length / 16, d, 16] and values [slots, n, length, d] in qkv's dtype; out [M, h, d].

    There are no slices in the loops: each would count references to its array, atomically.
    """
    groups, size, heads = keys.shape[1], keys.shape[3], out.shape[1]
    half, blocks = size // 2, keys.shape[2]
    turned = np.empty((heads + groups, 2, half), np.float32)
    total = np.empty(size, np.float32)
    scores = np.empty((blocks, LANES), np.float32)  # then probabilities
    for t in range(len(slot)):
        s, p = slot[t], position[t]
        for g in range(groups):
            _norm_rope(qkv, t, heads + g, key_norm, epsilon, cos, sin, p, turned)
            for c in range(2):
                for i in range(half):
                    keys[s, g, p // LANES, c * half + i, p % LANES] = narrow(turned[heads + g, c, i], keys)
                    values[s, g, p, c * half + i] = qkv[t, heads + groups + g, c, i]
    for t in range(len(slot)):
        s, p = slot[t], position[t]
        seen = p // LANES + 1
        for head in range(heads):
            _norm_rope(qkv, t, head, query_norm, epsilon, cos, sin, p, turned)
            for c in range(2):
                for i in range(half):
                    turned[head, c, i] *= scale
            row = s * groups + head // (heads // groups)
            for b in range(seen):
                accumulate(turned, head * size, keys, (row * blocks + b) * size * LANES, LANES, size, scores, b * LANES)
            for j in range(p % LANES + 1, LANES):
                scores[seen - 1, j] = np.float32(NEVER)
            top = np.float32(NEVER)
            for b in range(seen):
                top = max(top, block_max(scores, b * LANES))
            mass = np.float32(0.0)
            for b in range(seen):
                mass += block_exp(scores, b * LANES, top)
            for i in range(0, size, LANES):
                accumulate(scores, 0, values, row * blocks * LANES * size + i, size, p + 1, total, i)
            inverse = np.float32(1.0) / mass
            for i in range(size):
                out[t, head, i] = narrow(total[i] * inverse, out)
