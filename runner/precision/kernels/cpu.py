"""INT4 on a CPU: quantize + pack, unpack and in-place quantize-dequantize in one pass over the weights (numba).

The bits are those of `int4.py`, without a division per weight. For magnitudes a and a scale s, both bf16,

    round_half_even(bf16(fp32(a / s))) >= k    exactly when    a >= s * X_k   (k even)   or   a > s * X_k   (k odd)

where X_k is the midpoint below (k even) or above (k odd) the bf16 number k - 0.5: halves go to the even integer, and the
midpoint goes to the even bf16, which k - 0.5 is. The rounding of the fp32 quotient cannot move it across: a has 8
significant bits and s * X_k at most 17, so a quotient that is not X_k itself is further from it than half an fp32 ulp.
s * X_k is exact in fp32, so the smallest bf16 that reaches k is a 16-bit integer per group and k, and the
integer of a weight is the number of thresholds its bits reach: compares of 16-bit lanes, which LLVM vectorizes. The
dequantized magnitude is looked up the same way, by adding the steps between the bf16 products 0, s, 2s, ...

Rows come as [groups, blocks, 16]: loops of exactly 16 lanes become whole vectors whatever the group size, and indices that
start at 0 spare numba's check for negative ones, which keeps LLVM from vectorizing.

Kernels release the GIL and are split over rows by `threads.py`; numba's own parallel loops are not used, since they
take seconds to compile and end the process when two Python threads enter them.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

SIGN = 0x8000
MAGNITUDE = 0x7FFF
ZERO_GROUP_SCALE = 0x3C00  # 2^-7
LANES = 16
NEVER = 0xFFFF  # no magnitude reaches it
STEPS = 8  # thresholds; the eighth is -8's, which only llmcompressor has
EXACT, KIMI, LLMCOMPRESSOR = 0, 1, 2

# X_k in fp32 and whether reaching it exactly counts, k = 1..8 (ulp of bf16 is 2^-8 in [0.5, 1), 2^-7 in [1, 2), ...)
MIDPOINTS = np.array(
    [0.5 + 2**-9, 1.5 - 2**-8, 2.5 + 2**-7, 3.5 - 2**-7, 4.5 + 2**-6, 5.5 - 2**-6, 6.5 + 2**-6, 7.5 - 2**-6], np.float32
)
_compile: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


@intrinsic
def _block_amax(_typing, array, index):
    """Largest magnitude bits of the 16 weights at this flat index; LLVM does not find this reduction by itself."""

    def generate(context, builder, signature, arguments):
        lanes = ir.VectorType(ir.IntType(16), LANES)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), lanes.as_pointer())
        magnitudes = builder.and_(builder.load(pointer, align=2), ir.Constant(lanes, [MAGNITUDE] * LANES))
        reduction = ir.FunctionType(ir.IntType(16), [lanes])
        return builder.call(
            cgutils.get_or_insert_function(builder.module, reduction, "llvm.vector.reduce.umax.v16i16"), [magnitudes]
        )

    return types.uint16(array, types.int64), generate


@_compile
def _row_amax(row, amax):
    """Largest magnitude bits of each group of one row [groups, blocks, 16]; returns the largest of all."""
    largest = np.uint16(0)
    blocks = row.shape[1]
    for g in range(row.shape[0]):
        top = np.uint16(0)
        for b in range(blocks):
            top = max(top, _block_amax(row, (g * blocks + b) * LANES))  # type: ignore[call-arg]
        amax[g] = top
        largest = max(largest, top)
    return largest


@_compile
def _row_scales(amax, convention, floats, scale):
    """bf16 scale bits of one row from amax bits; `floats` is fp32 scratch of the same length."""
    divisor = np.float32(7.5) if convention == LLMCOMPRESSOR else np.float32(7.0)
    words = floats.view(np.uint32)
    for g in range(amax.shape[0]):
        words[g] = np.uint32(amax[g]) << np.uint32(16)
    for g in range(amax.shape[0]):
        floats[g] = floats[g] / divisor
    if convention == EXACT:
        for g in range(amax.shape[0]):
            bits = words[g]
            bits = (bits + np.uint32(0x3FFFF) + ((bits >> np.uint32(19)) & np.uint32(1))) & np.uint32(0xFFF80000)
            scale[g] = np.uint16(bits >> np.uint32(16))
    else:
        for g in range(amax.shape[0]):
            bits = words[g]
            scale[g] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    for g in range(amax.shape[0]):
        if scale[g] == 0:
            scale[g] = np.uint16(ZERO_GROUP_SCALE)


@_compile
def _row_thresholds(scale, midpoints, floats, thresholds):
    """thresholds [8, groups]: the smallest magnitude bits whose integer is at least k = 1..8."""
    words = floats.view(np.uint32)
    scale_words = np.empty(scale.shape[0], np.uint32)
    scale_floats = scale_words.view(np.float32)
    for g in range(scale.shape[0]):
        scale_words[g] = np.uint32(scale[g]) << np.uint32(16)
    for k in range(STEPS):
        midpoint = midpoints[k]
        # inclusive: round up to the next bf16; exclusive: the bf16 after the one below
        up = np.uint32(0xFFFF) if k % 2 else np.uint32(0x10000)
        out = thresholds[k]
        for g in range(scale.shape[0]):
            floats[g] = scale_floats[g] * midpoint
        for g in range(scale.shape[0]):
            out[g] = np.uint16((words[g] + up) >> np.uint32(16))


@_compile
def _row_steps(scale, floats, steps):
    """steps [8, groups]: differences between the bits of bf16(k * scale) for k = 1..8 and those for k - 1."""
    words = floats.view(np.uint32)
    scale_words = np.empty(scale.shape[0], np.uint32)
    scale_floats = scale_words.view(np.float32)
    for g in range(scale.shape[0]):
        scale_words[g] = np.uint32(scale[g]) << np.uint32(16)
    for k in range(STEPS):
        factor = np.float32(k + 1)
        out = steps[k]
        for g in range(scale.shape[0]):
            floats[g] = scale_floats[g] * factor
        for g in range(scale.shape[0]):
            bits = words[g]
            out[g] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    for k in range(STEPS - 1, 0, -1):
        for g in range(scale.shape[0]):
            steps[k, g] -= steps[k - 1, g]


@_compile
def _row_integers(row, thresholds, negative_eighth, nibbles):
    """integer + 8 of every weight of one row [groups, blocks, 16], as uint16."""
    for g in range(row.shape[0]):
        t1, t2, t3, t4 = thresholds[0, g], thresholds[1, g], thresholds[2, g], thresholds[3, g]
        t5, t6, t7 = thresholds[4, g], thresholds[5, g], thresholds[6, g]
        t8 = thresholds[7, g] if negative_eighth else np.uint16(NEVER)
        for b in range(row.shape[1]):
            for j in range(LANES):
                bits = row[g, b, j]
                a = np.uint16(bits & np.uint16(MAGNITUDE))
                count = np.uint16(a >= t1) + np.uint16(a >= t2) + np.uint16(a >= t3) + np.uint16(a >= t4)
                count += np.uint16(a >= t5) + np.uint16(a >= t6) + np.uint16(a >= t7)
                negative = np.uint16(8) - count - np.uint16(a >= t8)
                positive = np.uint16(8) + count
                nibbles[g, b, j] = np.uint16(negative if bits >= np.uint16(SIGN) else positive)


@_compile
def _row_dequantize(row, thresholds, steps, negative_eighth):
    """Replace every weight of one row [groups, blocks, 16] by the bf16 product of its integer and its scale."""
    zero = np.uint16(0)
    for g in range(row.shape[0]):
        t1, t2, t3, t4 = thresholds[0, g], thresholds[1, g], thresholds[2, g], thresholds[3, g]
        t5, t6, t7 = thresholds[4, g], thresholds[5, g], thresholds[6, g]
        t8 = thresholds[7, g] if negative_eighth else np.uint16(NEVER)
        s1, s2, s3, s4 = steps[0, g], steps[1, g], steps[2, g], steps[3, g]
        s5, s6, s7, s8 = steps[4, g], steps[5, g], steps[6, g], steps[7, g]
        for b in range(row.shape[1]):
            for j in range(LANES):
                bits = row[g, b, j]
                a = np.uint16(bits & np.uint16(MAGNITUDE))
                product = (s1 if a >= t1 else zero) + (s2 if a >= t2 else zero) + (s3 if a >= t3 else zero)
                product += (s4 if a >= t4 else zero) + (s5 if a >= t5 else zero) + (s6 if a >= t6 else zero)
                product += s7 if a >= t7 else zero
                negative = product + (s8 if a >= t8 else zero) + (np.uint16(SIGN) if a >= t1 else zero)
                row[g, b, j] = np.uint16(negative if bits >= np.uint16(SIGN) else product)


@_compile
def _row_pack(nibbles, packed):
    """Four uint16 nibbles (one uint64) -> one uint16 of the packed row."""
    for i in range(packed.shape[0]):
        x = nibbles[i]
        x = x | (x >> np.uint64(12))
        packed[i] = np.uint16((x & np.uint64(0xFF)) | ((x >> np.uint64(24)) & np.uint64(0xFF00)))


@_compile
def quantize_pack_rows(weight, midpoints, convention, keep, scale, packed):
    """weight uint16 [rows, groups, blocks, 16] -> scale uint16 [rows, groups], packed uint16 [rows, in / 4].

    Returns the largest amax bits. `keep`: `scale` holds the scales to use instead of derived ones.
    """
    rows, groups, blocks, _ = weight.shape
    amax = np.empty(groups, np.uint16)
    floats = np.empty(groups, np.float32)
    thresholds = np.empty((STEPS, groups), np.uint16)
    words = np.empty(packed.shape[1], np.uint64)
    nibbles = words.view(np.uint16).reshape(groups, blocks, LANES)
    largest = np.uint16(0)
    for r in range(rows):
        largest = max(largest, _row_amax(weight[r], amax))
        if not keep:
            _row_scales(amax, convention, floats, scale[r])
        _row_thresholds(scale[r], midpoints, floats, thresholds)
        _row_integers(weight[r], thresholds, convention == LLMCOMPRESSOR, nibbles)
        _row_pack(words, packed[r])
    return largest


@_compile
def quantize_dequantize_rows(weight, midpoints, convention, keep, limit, scale):
    """weight uint16 [rows, groups, blocks, 16] in place -> scale uint16 [rows, groups].

    Returns the largest amax bits; stops before it changes a row whose amax bits reach `limit` (NaN, infinities,
    overflow), so that the caller can name what is wrong with the weights that came in.
    """
    rows, groups, _, _ = weight.shape
    amax = np.empty(groups, np.uint16)
    floats = np.empty(groups, np.float32)
    thresholds = np.empty((STEPS, groups), np.uint16)
    steps = np.empty((STEPS, groups), np.uint16)
    largest = np.uint16(0)
    for r in range(rows):
        largest = max(largest, _row_amax(weight[r], amax))
        if largest >= limit:
            return largest
        if not keep:
            _row_scales(amax, convention, floats, scale[r])
        _row_thresholds(scale[r], midpoints, floats, thresholds)
        _row_steps(scale[r], floats, steps)
        _row_dequantize(weight[r], thresholds, steps, convention == LLMCOMPRESSOR)
    return largest


@_compile
def unpack_rows(packed, q):
    """packed uint16 [rows, in / 4] -> integers int8 [rows, in], as uint32 [rows, in / 4] of four."""
    for r in range(packed.shape[0]):
        source, target = packed[r], q[r]
        for i in range(source.shape[0]):
            x = np.uint32(source[i])
            x = (x | (x << np.uint32(8))) & np.uint32(0x00FF00FF)
            x = (x | (x << np.uint32(4))) & np.uint32(0x0F0F0F0F)
            # value - 8 per byte without borrows: flip the nibble's top bit, then extend it as the sign
            x = x ^ np.uint32(0x08080808)
            target[i] = x | ((x & np.uint32(0x08080808)) * np.uint32(30))
