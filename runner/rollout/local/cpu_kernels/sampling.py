"""One token per row of logits, by the numbers that `rollout/local/sampling.py` draws in torch."""

from __future__ import annotations

import math

import numpy as np

from runner.rollout.local.cpu_kernels.cache import compiled
from runner.rollout.local.cpu_kernels.lanes import LANES, NEVER, exp, largest, wide

GOLDEN = 0x9E3779B97F4A7C15


@compiled
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _uniform(seed, position, purpose):
    """`sampling.uniforms` for one number."""
    counter = np.uint64(position) * np.uint64(4) + np.uint64(purpose + 1)
    state = _mix(np.uint64(seed) + np.uint64(GOLDEN))
    mixed = _mix(state ^ _mix(counter * np.uint64(GOLDEN)))
    return (np.float64(mixed >> np.uint64(12)) + 0.5) * 2.0**-52


@compiled
def _choose(weights, uniform):
    """Inverse CDF over weights [V] in fp64, by blocks: the first token whose cumulated weight is above uniform * total."""
    total = 0.0
    for i in range(weights.shape[0]):
        total += np.float64(weights[i])
    goal = uniform * total
    reached, choice = 0.0, 0
    for start in range(0, weights.shape[0], LANES):
        block = weights[start : start + LANES]
        mass = 0.0
        for i in range(block.shape[0]):
            mass += np.float64(block[i])
        if reached + mass > goal:
            for i in range(block.shape[0]):
                if block[i] > np.float32(0.0):
                    choice = start + i
                reached += np.float64(block[i])
                if reached > goal:
                    return choice
            return choice
        if mass > 0.0:
            choice = start
            for i in range(block.shape[0]):
                if block[i] > np.float32(0.0):
                    choice = start + i
        reached += mass
    return choice


@compiled
def draw_rows(logits, temperature, seed, position, purpose, picked, tempered, raw):
    """One token per row of logits [N, V] by inverse CDF, and its logprob at its row's temperature and at 1.

    temperature fp64 [N], 0: the largest logit (its logprob at temperature 1 is then reported as both).
    """
    vocabulary = logits.shape[1]
    values, weights = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    for t in range(logits.shape[0]):
        row = logits[t]
        for i in range(vocabulary):
            values[i] = wide(row[i])
        top = largest(values, vocabulary)
        mass = np.float32(0.0)
        for i in range(vocabulary):
            values[i] = max(values[i] - top, np.float32(NEVER))
            weights[i] = exp(values[i])
            mass += weights[i]
        raw_log = np.float32(math.log(mass))
        heat = np.float32(temperature[t])
        if heat == np.float32(0.0):
            token = 0
            while values[token] < np.float32(0.0):
                token += 1
            picked[t], raw[t], tempered[t] = token, -raw_log, -raw_log
            continue
        log = raw_log
        cold = np.float32(1.0) / heat
        if heat != np.float32(1.0):
            mass = np.float32(0.0)
            for i in range(vocabulary):
                weights[i] = exp(values[i] * cold)
                mass += weights[i]
            log = np.float32(math.log(mass))
        for i in range(vocabulary):
            weights[i] = weights[i] if values[i] > np.float32(NEVER) else np.float32(0.0)
        token = _choose(weights, _uniform(seed[t], position[t], purpose))
        picked[t], raw[t], tempered[t] = token, values[token] - raw_log, values[token] * cold - log
