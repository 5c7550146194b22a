"""The parts of a decoder layer between its matmuls, one numba kernel each, for scores token batches on a CPU.

torch spends 5 to 30 microseconds per operation on tensors as small as a decode step's, and a layer has about a hundred
of them; these kernels make it five. They round to the activations' dtype where transformers' modules do, so that what
comes out differs from them by the order of additions only, and a token's result does not depend on its batch.

bf16 arrays come as uint16 (their bits), fp32 arrays as float32: every kernel takes both. All release the GIL.

Shape legend: N tokens, H hidden, K experts per token, E experts, I expert ffn, h query heads, n key-value heads, d head
size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
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
EXP_LOWEST, EXP_LOG2_E, EXP_LN_2 = -87.0, 1.44269504088896341, (0.693359375, -2.12194440e-4)
EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.50000001201, 1.0, 1.0)
# oneDNN compiles a bf16 matmul for every new number of rows (milliseconds each), and sequences end one by one: rounded
# up, the numbers repeat.
ROW_BLOCK = 16
STACKED_WASTE = 4  # rows of a batched matmul per row that is needed, at most: calls cost more than rows there
INT4_ROWS_PER_CALL = 64  # the CPU kernel is built for few rows: 8 calls of 64 rows take a tenth of one call of 512
_LIBRARIES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
LANES = 16  # inner loops of exactly this many become whole vectors, whatever the length
NEVER = -1e30  # a score or logit that has probability zero


@intrinsic
def _bits(_typing, x):
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _float(_typing, x):
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _accumulate(_typing, factors, first, data, offset, stride, count, out, place):
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
def _block_max(_typing, x, place):
    """Largest of float32 x[place : place + 16]; a NaN among them is not seen."""

    def generate(context, builder, signature, arguments):
        values = builder.load(_block(context, builder, signature.args[0], *arguments), align=4)
        return _call(builder, "llvm.vector.reduce.fmax.v16f32", [values], ir.FloatType())

    return types.float32(x, types.int64), generate


@intrinsic
def _block_exp(_typing, x, place, top):
    """x[place : place + 16] = exp(x - top) for x <= top, as `_exp`; returns their sum."""

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
    x = max(x, np.float32(EXP_LOWEST))
    n = np.floor(x * np.float32(EXP_LOG2_E) + np.float32(0.5))
    r = x - n * np.float32(EXP_LN_2[0]) - n * np.float32(EXP_LN_2[1])
    value = np.float32(EXP_POLYNOMIAL[0])
    for i in range(1, len(EXP_POLYNOMIAL)):
        value = value * r + np.float32(EXP_POLYNOMIAL[i])
    return value * _float(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@_compile_without_nan
def _largest(x, count):
    """Of the first `count` > 0 of float32 x. A NaN is not seen here; it comes out of the exponentials."""
    top = x[0]
    for i in range(count):
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
def _norm_rope(source, t, head, weight, epsilon, cos, sin, p, out):
    """One head: source[t, head] [2, d / 2], RMSNorm, rotation by halves at position p -> out[head] [2, d / 2] float32."""
    half = source.shape[3]
    squares = np.float32(0.0)
    for c in range(2):
        for i in range(half):
            value = _wide(source[t, head, c, i])
            out[head, c, i] = value
            squares += value * value
    scale = np.float32(1.0) / np.sqrt(squares / np.float32(2 * half) + epsilon)
    for i in range(half):
        a = _rounded(_rounded(out[head, 0, i] * scale, source) * _wide(weight[0, i]), source)
        b = _rounded(_rounded(out[head, 1, i] * scale, source) * _wide(weight[1, i]), source)
        first = _rounded(a * _wide(cos[p, 0, i]), source) - _rounded(b * _wide(sin[p, 0, i]), source)
        second = _rounded(b * _wide(cos[p, 1, i]), source) + _rounded(a * _wide(sin[p, 1, i]), source)
        out[head, 0, i], out[head, 1, i] = _rounded(first, source), _rounded(second, source)


@_compile
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
                    keys[s, g, p // LANES, c * half + i, p % LANES] = _narrow(turned[heads + g, c, i], keys)
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
                _accumulate(turned, head * size, keys, (row * blocks + b) * size * LANES, LANES, size, scores, b * LANES)
            for j in range(p % LANES + 1, LANES):
                scores[seen - 1, j] = np.float32(NEVER)
            top = np.float32(NEVER)
            for b in range(seen):
                top = max(top, _block_max(scores, b * LANES))
            mass = np.float32(0.0)
            for b in range(seen):
                mass += _block_exp(scores, b * LANES, top)
            for i in range(0, size, LANES):
                _accumulate(scores, 0, values, row * blocks * LANES * size + i, size, p + 1, total, i)
            inverse = np.float32(1.0) / mass
            for i in range(size):
                out[t, head, i] = _narrow(total[i] * inverse, out)


@_compile
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


@_compile
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


# -- matmuls: torch's own, through the C interface that it gives to compiled models (AOTInductor). A whole layer is then one
# call that never takes the interpreter lock, and parts of a batch on several threads do not wait for each other.


def _torch_function(name: str, *arguments: Any) -> Any:
    llvmlite.binding.add_symbol(name, ctypes.cast(getattr(_LIBRARY, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, types.int32(*arguments))


_LIBRARY = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARIES[sys.platform]))
_WORD = types.int64  # handles and addresses
_new_tensor = _torch_function("aoti_torch_create_tensor_from_blob", *[_WORD] * 5, types.int32, types.int32, types.int32, _WORD)
_delete_tensor = _torch_function("aoti_torch_delete_tensor_object", _WORD)
_data_of = _torch_function("aoti_torch_get_data_ptr", _WORD, _WORD)
_mm_out = _torch_function("aoti_torch_cpu_mm_out", _WORD, _WORD, _WORD)
_bmm_out = _torch_function("aoti_torch_cpu_bmm_out", _WORD, _WORD, _WORD)
_int4_mm = _torch_function("aoti_torch_cpu__weight_int4pack_mm_cpu_tensor", *[_WORD] * 5)
_copy = types.ExternalFunction("memcpy", _WORD(_WORD, _WORD, _WORD))
_BF16, _FP32 = 15, 6  # torch's numbers of its dtypes


class TensorHandle:
    """What compiled code calls a torch tensor by. The tensor's memory must stay where it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()
        sizes, strides = np.array(tensor.shape, np.int64), np.array(tensor.stride(), np.int64)
        kind = {torch.bfloat16: _BF16, torch.float32: _FP32, torch.uint8: 0, torch.int64: 4}[tensor.dtype]
        handle = np.zeros(1, np.int64)
        create = _LIBRARY.aoti_torch_create_tensor_from_blob
        create.argtypes = [ctypes.c_int64] * 5 + [ctypes.c_int32] * 3 + [ctypes.c_int64]
        places = (array.ctypes.data for array in (sizes, strides))
        if create(tensor.data_ptr(), tensor.dim(), *places, 0, kind, 0, 0, handle.ctypes.data):
            raise RuntimeError("torch cannot make a tensor of this memory")
        self.address = int(handle[0])

    def __del__(self) -> None:
        delete = _LIBRARY.aoti_torch_delete_tensor_object
        delete.argtypes = [ctypes.c_int64]
        delete(self.address)


@_compile
def _new_rows(array, first, batch, rows, columns, words):
    """Handle of rows first .. of a C-contiguous array as a tensor [rows, columns], or [batch, rows, columns] if batch > 0."""
    words[0], words[1], words[2] = batch, rows, columns
    words[3], words[4], words[5] = rows * columns, columns, 1
    skip = 0 if batch else 1
    place = words.ctypes.data
    data = array.ctypes.data + first * columns * array.itemsize
    kind = _BF16 if array.itemsize == 2 else _FP32
    _new_tensor(data, 3 - skip, place + 8 * skip, place + 24 + 8 * skip, 0, kind, 0, 0, place + 48)
    return words[6]


@_compile
def _packed_rows(x, first, rows, packed, scales, group, out, column, columns, words):
    """out[first : first + rows, column : column + columns] = x[the same rows] times a packed INT4 weight; 0 when well."""
    failed = 0
    for start in range(first, first + rows, INT4_ROWS_PER_CALL):
        count = min(INT4_ROWS_PER_CALL, first + rows - start)
        source = _new_rows(x, start, 0, count, x.shape[1], words)
        place = words.ctypes.data
        failed |= _int4_mm(source, packed, group, scales, place)
        if failed:
            return failed
        result = words[0]
        failed |= _data_of(result, place)
        item, width = out.itemsize, out.shape[1]
        if columns == width:
            _copy(out.ctypes.data + start * width * item, words[0], count * width * item)
        else:
            for i in range(count):
                target = out.ctypes.data + ((start + i) * width + column) * item
                _copy(target, words[0] + i * columns * item, columns * item)
        _delete_tensor(source)
        _delete_tensor(result)
    return failed


@_compile
def product(x, rows, weights, group, out):
    """out[:rows] = x[:rows] times weights stacked along their outputs: [pieces, 3] of (handle, handle of scales, outputs).

    group: handle of the group size of packed INT4 weights, 0 for one dense weight (transposed, [in, out]).
    Returns 0 when torch computed it.
    """
    words = np.empty(8, np.int64)
    failed, column = 0, 0
    if group:
        for piece in range(weights.shape[0]):
            columns = weights[piece, 2]
            failed |= _packed_rows(x, 0, rows, weights[piece, 0], weights[piece, 1], group, out, column, columns, words)
            column += columns
        return failed
    source = _new_rows(x, 0, 0, rows, x.shape[1], words)
    target = _new_rows(out, 0, 0, rows, out.shape[1], words)
    failed = _mm_out(target, source, weights[0, 0])
    _delete_tensor(source)
    _delete_tensor(target)
    return failed


@_compile
def expert_products(x, first, sizes, weights, stacked, group, out):
    """out[first[e] : + sizes[e]] = x[the same rows] times expert e's weight, weights [E, 3] as in `product`.

    stacked: handle of all dense weights [E, in, out]; used when every expert has equally many rows.
    """
    words = np.empty(8, np.int64)
    failed, experts, equal = 0, len(sizes), True
    for e in range(experts):
        equal &= sizes[e] == sizes[0]
    if stacked and equal:
        source = _new_rows(x, 0, experts, sizes[0], x.shape[1], words)
        target = _new_rows(out, 0, experts, sizes[0], out.shape[1], words)
        failed = _bmm_out(target, source, stacked)
        _delete_tensor(source)
        _delete_tensor(target)
        return failed
    for e in range(experts):
        if group and sizes[e]:
            failed |= _packed_rows(x, first[e], sizes[e], weights[e, 0], weights[e, 1], group, out, 0, out.shape[1], words)
        elif sizes[e]:
            source = _new_rows(x, first[e], 0, sizes[e], x.shape[1], words)
            target = _new_rows(out, first[e], 0, sizes[e], out.shape[1], words)
            failed |= _mm_out(target, source, weights[e, 0])
            _delete_tensor(source)
            _delete_tensor(target)
    return failed


@_compile
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


# -- layers


@_compile
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


@_compile
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


@_compile
def dense_block(normed, gate_up_weights, gate_up_group, both, inner, down_weights, down_group, added):
    """A dense mlp: normed [M, H] -> added [M, H]. Returns 0 when torch computed it."""
    failed = product(normed, len(normed), gate_up_weights, gate_up_group, both)
    gate_activation(both, inner)
    return failed | product(inner, len(normed), down_weights, down_group, added)


# -- sampling


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
        top = _largest(values, vocabulary)
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
