"""Which tokens go to which expert, where their rows lie, and the gate between the two matmuls of an mlp."""

from __future__ import annotations

import numpy as np

from runner.rollout.local.cpu_kernels.cache import compiled
from runner.rollout.local.cpu_kernels.lanes import exp, narrow, rounded, wide

# oneDNN compiles a bf16 matmul for every new number of rows (milliseconds each), and sequences end one by one: rounded
# up, the numbers repeat.
ROW_BLOCK = 16
STACKED_WASTE = 4  # rows of a batched matmul per row that is needed, at most: calls cost more than rows there


@compiled
def route(x, gate, normalize, index, share, place, counts):
    """Softmax top-k routing of the first N rows of x [M, H] by gate [E, H].

    index [N, K] experts, largest first (the lower one of equals); share [N, K] float32 weights, rounded to x's dtype;
    place [N, K] number of each pair among those of its expert; counts [E] pairs per expert.
    """
    tokens, size = len(index), x.shape[1]
    experts, k_count = gate.shape[0], index.shape[1]
    logits = np.empty(experts, np.float32)
    for e in range(experts):
        counts[e] = 0
    for t in range(tokens):
        row = x[t]
        top = np.float32(-np.inf)
        for e in range(experts):
            lane = gate[e]
            dot = np.float32(0.0)
            for i in range(size):
                dot += wide(row[i]) * wide(lane[i])
            logits[e] = rounded(dot, x)
            top = max(top, logits[e])
        mass = np.float32(0.0)
        for e in range(experts):
            logits[e] = exp(logits[e] - top)
            mass += logits[e]
        chosen_mass = np.float32(0.0)
        for k in range(k_count):
            best = 0
            for e in range(1, experts):
                if logits[e] > logits[best]:
                    best = e
            index[t, k] = best
            share[t, k] = logits[best] / mass
            chosen_mass += share[t, k]
            logits[best] = np.float32(-1.0)
            place[t, k] = counts[best]
            counts[best] += 1
        for k in range(k_count):
            value = share[t, k] / chosen_mass if normalize else share[t, k]
            share[t, k] = rounded(value, x)


@compiled
def spread(x, index, first, place, rows):
    """rows [P, H]: x [M, H] once for each of its experts index [N, K], an expert's rows from first [E] on; place [N, K] becomes
    the row of each pair."""
    size = x.shape[1]
    for t in range(len(index)):
        source = x[t]
        for k in range(index.shape[1]):
            where = place[t, k] + first[index[t, k]]
            place[t, k] = where
            target = rows[where]
            for i in range(size):
                target[i] = source[i]


@compiled
def gate_activation(both, inner):
    """inner [P, I] = silu(both[:, :I]) * both[:, I:]."""
    size = inner.shape[1]
    for t in range(inner.shape[0]):
        gate, up, out = both[t, :size], both[t, size:], inner[t]
        for i in range(size):
            x = wide(gate[i])
            activated = rounded(x / (np.float32(1.0) + exp(min(-x, np.float32(88.0)))), both)
            out[i] = narrow(activated * wide(up[i]), inner)


@compiled
def expert_layout(counts, stacked, sizes, first):
    """sizes and first row [E] of every expert for counts [E] pairs; returns the rows in all.

    Stacked weights get equally many rows each unless routing is so uneven that it would waste more than it saves; with
    packed weights rows are what costs, so that each gets just its own.
    """
    experts, total, most = len(counts), 0, 0
    for e in range(experts):
        total += counts[e]
        most = max(most, counts[e])
    most = -(-most // ROW_BLOCK) * ROW_BLOCK
    equal = stacked != 0 and most * experts <= STACKED_WASTE * max(total, ROW_BLOCK * experts)
    running = 0
    for e in range(experts):
        first[e] = running
        sizes[e] = most if equal else counts[e]
        running += sizes[e]
    return running
