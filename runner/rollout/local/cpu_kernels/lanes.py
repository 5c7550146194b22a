"""What the kernels are made of: reading and rounding stored numbers, and sums and exponentials of 16 at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic
from numba.extending import overload

from runner.rollout.local.cpu_kernels.cache import compiled, compiled_without_nan

intrinsic: Any = _intrinsic  # its type is that of the generator, not of what it makes

EXP_LOWEST, EXP_LOG2_E, EXP_LN_2 = -87.0, 1.44269504088896341, (0.693359375, -2.12194440e-4)
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.50000001201, 1.0, 1.0)
LANES = 16  # inner loops of exactly this many become whole vectors, whatever the length
NEVER = -1e30  # a score or logit that has probability zero


@intrinsic
def _bits(_typing, x):
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(_typing, x):
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def accumulate(_typing, factors, first, data, offset, stride, count, out, place):
    """out[place : place + 16] = sum over i < count of factors[first + i] * data[offset + i * stride : .. + 16].

    Flat indices into C-contiguous arrays; factors and out are float32. LLVM does not make vectors of this loop by itself:
    it cannot know that out is not data.
    """

    def generate(context, builder, signature, arguments):
        def pointer(k, index):
            array = context.make_array(signature.args[k])(context, builder, arguments[k])
            return builder.gep(array.data, [index])

        lanes, index = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        total = cgutils.alloca_once(builder, lanes)
        builder.store(ir.Constant(lanes, [0.0] * LANES), total)
        with cgutils.for_range(builder, arguments[5], intp=index) as loop:
            factor = builder.load(pointer(0, builder.add(arguments[1], loop.index)))
            start = pointer(2, builder.add(arguments[3], builder.mul(loop.index, arguments[4])))
            if signature.args[2].dtype == types.uint16:
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
        target = builder.bitcast(pointer(6, arguments[7]), lanes.as_pointer())
        builder.store(builder.load(total), target, align=4)
        return context.get_dummy_value()

    whole = types.int64
    return types.none(factors, whole, data, whole, whole, whole, out, whole), generate


def _block(context, builder, array_type, array, index):
    """Pointer to the 16 float32 at a flat index of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(ir.FloatType(), LANES).as_pointer())


def _call(builder, name, arguments, result):
    """An LLVM intrinsic function that gives `result`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, fastmath=("reassoc", "nsz"))


@intrinsic
def block_max(_typing, x, place):
    """Largest of float32 x[place : place + 16]; a NaN among them is not seen."""

    def generate(context, builder, signature, arguments):
        values = builder.load(_block(context, builder, signature.args[0], *arguments), align=4)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", [values], ir.FloatType())

    return types.float32(x, types.int64), generate


@intrinsic
def block_exp(_typing, x, place, top):
    """x[place : place + 16] = exp(x - top) for x <= top, as `exp`; returns their sum."""

    def generate(context, builder, signature, arguments):
        lanes, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

        def constant(value):
            return ir.Constant(lanes, [float(np.float32(value))] * LANES)

        spread = builder.insert_element(ir.Constant(lanes, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(spread, ir.Constant(lanes, ir.Undefined), ir.Constant(words, [0] * LANES))
        pointer = _block(context, builder, signature.args[0], arguments[0], arguments[1])
        x = builder.fsub(builder.load(pointer, align=4), spread)
        x = builder.select(builder.fcmp_ordered(">", x, constant(EXP_LOWEST)), x, constant(EXP_LOWEST))
        scaled = builder.fadd(builder.fmul(x, constant(EXP_LOG2_E)), constant(0.5))
        n = _call(builder, "llvm.floor.v16f32", [scaled], lanes)
        r = x
        for part in EXP_LN_2:
            r = builder.fsub(r, builder.fmul(n, constant(part), flags=("contract",)), flags=("contract",))
        value = constant(EXP_POLYNOMIAL[0])
        for factor in EXP_POLYNOMIAL[1:]:
            value = builder.fadd(builder.fmul(value, r, flags=("contract",)), constant(factor), flags=("contract",))
        power = builder.add(builder.fptosi(n, words), ir.Constant(words, [127] * LANES))
        power = builder.bitcast(builder.shl(power, ir.Constant(words, [23] * LANES)), lanes)
        value = builder.fmul(value, power)
        builder.store(value, pointer, align=4)
        return _call(builder, "llvm.vector.reduce.fadd.v16f32", [ir.Constant(ir.FloatType(), 0.0), value], ir.FloatType())

    return types.float32(x, types.int64, types.float32), generate


def wide(x):
    """Stored value -> float32."""


def narrow(x, array):
    """float32 -> what an element of `array` stores, to the nearest, halves to even."""


def rounded(x, array):
    """float32 rounded as if it were stored in `array`."""


@overload(wide, inline="always")
def _overload_wide(x):
    if x == types.uint16:
        return lambda x: _float(np.uint32(x) << np.uint32(16))
    return lambda x: x


@overload(narrow, inline="always")
def _overload_narrow(x, array):
    if array.dtype == types.uint16:

        def narrow(x, array):
            bits: Any = _bits(np.float32(x))
            return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

        return narrow
    return lambda x, array: np.float32(x)


@overload(rounded, inline="always")
def _overload_rounded(x, array):
    if array.dtype == types.uint16:

        def rounded(x, array):
            bits: Any = _bits(np.float32(x))
            return _float((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000))

        return rounded
    return lambda x, array: np.float32(x)


@compiled
def exp(x):
    """exp of float32 x <= 88 within 2 ulp, without a call, so that loops over it become vectors (Cephes' expf)."""
    x = max(x, np.float32(EXP_LOWEST))
    n = np.floor(x * np.float32(EXP_LOG2_E) + np.float32(0.5))
    r = x - n * np.float32(EXP_LN_2[0]) - n * np.float32(EXP_LN_2[1])
    value = np.float32(EXP_POLYNOMIAL[0])
    for i in range(1, len(EXP_POLYNOMIAL)):
        value = value * r + np.float32(EXP_POLYNOMIAL[i])
    return value * _float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@compiled_without_nan
def largest(x, count):
    """Of the first `count` > 0 of float32 x. A NaN is not seen here; it comes out of the exponentials."""
    top = x[0]
    for i in range(count):
        top = max(top, x[i])
    return top
