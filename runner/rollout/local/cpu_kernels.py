"""The parts of a decoder layer between its matmuls, one numba kernel each, for scores token batches on a CPU.

torch spends 5 to 30 microseconds per operation on tensors as small as a decode step's, and a layer has about a hundred
of them; these kernels make it five. They round to the activations' dtype where transformers' modules do, so that what
comes out differs from them by the order of additions only, and a token's result does not depend on its batch.

bf16 arrays come as uint16 (their bits), fp32 arrays as float32: every kernel takes both. All release the GIL.

Shape legend: N tokens, H hidden, K experts per token, E experts, I expert ffn, h query heads, n key-value heads, d head
size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic
from numba.extending import overload

intrinsic: Any = _intrinsic  # its type is that of the generator, not of what it makes

# Sums may be reordered and products fused, so that loops become vectors; NaN and infinities keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}
_compile: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath=_FAST)
_compile_without_nan: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath=_FAST | {"nnan"})
GOLDEN = 0x9E3779B97F4A7C15
LANES = 16  # inner loops of exactly this many become whole vectors, whatever the length
NEVER = -1e4  # a logit this far below the largest has probability zero


@intrinsic
def _bits(_typing, x):
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(_typing, x):
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _accumulate(_typing, factors, data, offset, stride, count, out, place):
    """out[place : place + 16] = sum over i < count of factors[i] * data[offset + i * stride : .. + 16]; C-contiguous arrays.

    factors and out are float32. LLVM does not make vectors of this loop by itself: it cannot know that out is not data.
    """

    def generate(context, builder, signature, arguments):
        def pointer(k, index):
            array = context.make_array(signature.args[k])(context, builder, arguments[k])
            return builder.gep(array.data, [index])

        lanes, index = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        total = cgutils.alloca_once(builder, lanes)
        builder.store(ir.Constant(lanes, [0.0] * LANES), total)
        with cgutils.for_range(builder, arguments[4], intp=index) as loop:
            factor = builder.load(pointer(0, loop.index))
            start = pointer(1, builder.add(arguments[2], builder.mul(loop.index, arguments[3])))
            if signature.args[1].dtype == types.uint16:
                words = builder.load(builder.bitcast(start, ir.VectorType(ir.IntType(16), LANES).as_pointer()), align=2)
                words = builder.zext(words, ir.VectorType(ir.IntType(32), LANES))
                values = builder.bitcast(builder.shl(words, ir.Constant(words.type, [16] * LANES)), lanes)
            else:
                values = builder.load(builder.bitcast(start, lanes.as_pointer()), align=4)
            spread = builder.insert_element(ir.Constant(lanes, ir.Undefined), factor, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            spread = builder.shuffle_vector(spread, ir.Constant(lanes, ir.Undefined), zeros)
            fused = builder.fadd(builder.load(total), builder.fmul(spread, values, flags=("contract",)), flags=("contract",))
            builder.store(fused, total)
        target = builder.bitcast(pointer(5, arguments[6]), lanes.as_pointer())
        builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    whole = types.int64
    return types.none(factors, data, whole, whole, whole, out, whole), generate


def _wide(x):
    """Stored value -> float32."""


def _narrow(x, array):
    """float32 -> what an element of `array` stores, to the nearest, halves to even."""


def _rounded(x, array):
    """float32 rounded as if it were stored in `array`."""


@overload(_wide, inline="always")
def _overload_wide(x):
    if x == types.uint16:
        return lambda x: _float(np.uint32(x) << np.uint32(16))
    return lambda x: x


@overload(_narrow, inline="always")
def _overload_narrow(x, array):
    if array.dtype == types.uint16:

        def narrow(x, array):
            bits: Any = _bits(np.float32(x))
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return narrow
    return lambda x, array: np.float32(x)


@overload(_rounded, inline="always")
def _overload_rounded(x, array):
    if array.dtype == types.uint16:

        def rounded(x, array):
            bits: Any = _bits(np.float32(x))
            return _float((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))

        return rounded
    return lambda x, array: np.float32(x)


@_compile
def _exp(x):
    """exp of float32 x <= 88 within 2 ulp, without a call, so that loops over it become vectors (Cephes' expf)."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * _float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@_compile_without_nan
def _largest(x):
    """Of float32 [n], n > 0. A NaN is not seen here; it comes out of the exponentials."""
    top = x[0]
    for i in range(x.shape[0]):
        top = max(top, x[i])
    return top


@_compile
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
                total[i] += _rounded(factor * _wide(source[i]), hidden)
        squares = np.float32(0.0)
        for i in range(size):
            value = _rounded(_wide(row[i]) + _rounded(total[i], hidden), hidden)
            row[i] = _narrow(value, hidden)
            total[i] = value
            squares += value * value
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + epsilon)
        for i in range(size):
            out[i] = _narrow(_rounded(total[i] * scale, normed) * _wide(weight[i]), normed)


@_compile
def _norm_rope(source, weight, epsilon, cos, sin, scratch, out):
    """One head: source [d], RMSNorm unless weight is empty, rotation by halves -> out [d] float32."""
    size = out.shape[0]
    half = size // 2
    for i in range(size):
        scratch[i] = _wide(source[i])
    if weight.shape[0]:
        squares = np.float32(0.0)
        for i in range(size):
            squares += scratch[i] * scratch[i]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(size) + epsilon)
        for i in range(size):
            scratch[i] = _rounded(_rounded(scratch[i] * scale, source) * _wide(weight[i]), source)
    first, second, out_first, out_second = scratch[:half], scratch[half:], out[:half], out[half:]
    cos_second, sin_second = cos[half:], sin[half:]
    for i in range(half):
        rotated = _rounded(second[i] * _wide(sin[i]), source)
        out_first[i] = _rounded(_rounded(first[i] * _wide(cos[i]), source) - rotated, source)
    for i in range(half):
        rotated = _rounded(first[i] * _wide(sin_second[i]), source)
        out_second[i] = _rounded(_rounded(second[i] * _wide(cos_second[i]), source) + rotated, source)


@_compile
def attend(qkv, query_norm, key_norm, epsilon, cos, sin, slot, position, scale, keys, values, out):
    """Causal attention of N tokens over their slots' caches, after writing their own keys and values there.

    qkv [N, (h + 2 n) d]; query_norm, key_norm [d] or empty; cos, sin [positions, d]; slot, position [N];
    keys [slots, n, blocks, d, 16] and values [slots, n, positions, d] in qkv's dtype; out [N, h d].
    """
    tokens, groups, size = qkv.shape[0], keys.shape[1], keys.shape[3]
    heads = out.shape[1] // size
    per_group = heads // groups
    scratch, query, total = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    scores = np.empty(keys.shape[2] * LANES, np.float32)  # scores, then probabilities
    for t in range(tokens):
        s, p, row = slot[t], position[t], qkv[t]
        for g in range(groups):
            _norm_rope(row[(heads + g) * size : (heads + g + 1) * size], key_norm, epsilon, cos[p], sin[p], scratch, query)
            block = keys[s, g, p // LANES]
            source, target = row[(heads + groups + g) * size : (heads + groups + g + 1) * size], values[s, g, p]
            for i in range(size):
                block[i, p % LANES] = _narrow(query[i], keys)
                target[i] = source[i]
    for t in range(tokens):
        s, p, row = slot[t], position[t], qkv[t]
        length = p + 1
        blocks = p // LANES + 1
        for head in range(heads):
            g = head // per_group
            _norm_rope(row[head * size : (head + 1) * size], query_norm, epsilon, cos[p], sin[p], scratch, query)
            for i in range(size):
                query[i] *= scale
            first = ((s * groups + g) * keys.shape[2]) * size * LANES
            for b in range(blocks):
                _accumulate(query, keys, first + b * size * LANES, LANES, size, scores, b * LANES)
            seen = scores[: blocks * LANES]
            for j in range(length, seen.shape[0]):
                seen[j] = np.float32(-1e30)
            top = _largest(seen)
            mass = np.float32(0.0)
            for j in range(seen.shape[0]):
                weight = _exp(seen[j] - top)
                seen[j] = weight
                mass += weight
            first = (s * groups + g) * values.shape[2] * size
            for i in range(0, size, LANES):
                _accumulate(scores, values, first + i, size, length, total, i)
            target = out[t, head * size : (head + 1) * size]
            inverse = np.float32(1.0) / mass
            for i in range(size):
                target[i] = _narrow(total[i] * inverse, out)


@_compile
def route(x, gate, normalize, index, share, place, counts, rows):
    """Softmax top-k routing of x [N, H] by gate [E, H], and the experts' inputs in expert order.

    index [N, K] experts, largest first (the lower one of equals); share [N, K] float32 weights, rounded to x's dtype;
    place [N, K] row of each pair in rows [N K, H]; counts [E] rows per expert.
    """
    tokens, size = x.shape
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
                dot += _wide(row[i]) * _wide(lane[i])
            logits[e] = _rounded(dot, x)
            top = max(top, logits[e])
        mass = np.float32(0.0)
        for e in range(experts):
            logits[e] = _exp(logits[e] - top)
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
            share[t, k] = _rounded(value, x)
    first = np.empty(experts, np.int64)
    running = 0
    for e in range(experts):
        first[e] = running
        running += counts[e]
    for t in range(tokens):
        source = x[t]
        for k in range(k_count):
            where = place[t, k] + first[index[t, k]]
            place[t, k] = where
            target = rows[where]
            for i in range(size):
                target[i] = source[i]


@_compile
def gate_activation(both, inner):
    """inner [P, I] = silu(both[:, :I]) * both[:, I:]."""
    size = inner.shape[1]
    for t in range(inner.shape[0]):
        gate, up, out = both[t, :size], both[t, size:], inner[t]
        for i in range(size):
            x = _wide(gate[i])
            activated = _rounded(x / (np.float32(1.0) + _exp(min(-x, np.float32(88.0)))), both)
            out[i] = _narrow(activated * _wide(up[i]), inner)


@_compile
def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def _uniform(seed, position, purpose):
    """`sampling.uniforms` for one number."""
    counter = np.uint64(position) * np.uint64(4) + np.uint64(purpose + 1)
    state = _mix(np.uint64(seed) + np.uint64(GOLDEN))
    mixed = _mix(state ^ _mix(counter * np.uint64(GOLDEN)))
    return (np.float64(mixed >> np.uint64(12)) + 0.5) * 2.0**-52


@_compile
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


@_compile
def draw_rows(logits, temperature, seed, position, purpose, picked, tempered, raw):
    """One token per row of logits [N, V] by inverse CDF, and its logprob at its row's temperature and at 1.

    temperature fp64 [N], 0: the largest logit (its logprob at temperature 1 is then reported as both).
    """
    vocabulary = logits.shape[1]
    values, weights = np.empty(vocabulary, np.float32), np.empty(vocabulary, np.float32)
    for t in range(logits.shape[0]):
        row = logits[t]
        for i in range(vocabulary):
            values[i] = _wide(row[i])
        top = _largest(values)
        mass = np.float32(0.0)
        for i in range(vocabulary):
            values[i] = max(values[i] - top, np.float32(NEVER))
            weights[i] = _exp(values[i])
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
                weights[i] = _exp(values[i] * cold)
                mass += weights[i]
            log = np.float32(math.log(mass))
        for i in range(vocabulary):
            weights[i] = weights[i] if values[i] > np.float32(NEVER) else np.float32(0.0)
        token = _choose(weights, _uniform(seed[t], position[t], purpose))
        picked[t], raw[t], tempered[t] = token, values[token] - raw_log, values[token] * cold - log
