"""Matmuls: torch's own, through the C interface that it gives to compiled models (AOTInductor).

A whole layer is then one call that never takes the interpreter lock, and parts of a batch on several threads do not wait
for each other. These functions lie below torch's dispatcher: where bf16 products are widened (precision/cpu_matmul.py), it is
done here too.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.np.numpy_support import carray

from runner.rollout.local.cpu_kernels.cache import compiled
from runner.rollout.local.cpu_kernels.lanes import intrinsic, narrow, wide

INT4_ROWS_PER_CALL = 64  # the CPU kernel is built for few rows: 8 calls of 64 rows take a tenth of one call of 512
WIDENED_COLUMNS = 512  # outputs whose weights are fp32 at one time: they stay in the cache
_LIBRARIES = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}


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
_DELETE = _LIBRARY.aoti_torch_delete_tensor_object
_DELETE.argtypes = [ctypes.c_int64]


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

    def __del__(self, delete: Any = _DELETE) -> None:  # a default: when the interpreter ends, the module's names are gone first
        delete(self.address)


@compiled
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


@intrinsic
def _bf16_at(_typing, address):
    """The address (int64) as a pointer to bf16 bits."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.uint16)(types.int64), generate


@compiled
def _new_matrix(array, rows, columns, row_stride, column_stride, words):
    """Handle of a float32 array's memory as a tensor [rows, columns] with these strides."""
    words[0], words[1], words[2], words[3] = rows, columns, row_stride, column_stride
    place = words.ctypes.data
    _new_tensor(array.ctypes.data, 2, place, place + 16, 0, _FP32, 0, 0, place + 48)
    return words[6]


@compiled
def _widened_rows(x, first, rows, address, columns, out, words):
    """out[first : first + rows] = x[the same rows] times the bf16 weight [columns, in] at an address: operands widened to fp32,
    the sum rounded once. Returns 0 when torch computed it."""
    most = min(columns, WIDENED_COLUMNS)
    wide_x, wide_weight = np.empty((rows, x.shape[1]), np.float32), np.empty((most, x.shape[1]), np.float32)
    result = np.empty((rows, most), np.float32)
    for i in range(rows):
        for j in range(x.shape[1]):
            wide_x[i, j] = wide(x[first + i, j])
    failed = 0
    for start in range(0, columns, most):
        failed |= _widened_columns(wide_x, address, start, min(most, columns - start), wide_weight, result, first, out, words)
    return failed


@compiled
def _widened_columns(wide_x, address, start, count, wide_weight, result, first, out, words):
    """Outputs start .. start + count of `_widened_rows`. Its buffers are arguments here because numba frees an array after its
    last use by name, and what torch is given are addresses."""
    rows, inner = wide_x.shape
    weight = carray(_bf16_at(address), (start + count, inner))
    for i in range(count):
        for j in range(inner):
            wide_weight[i, j] = wide(weight[start + i, j])
    source = _new_rows(wide_x, 0, 0, rows, inner, words)
    transposed = _new_matrix(wide_weight, inner, count, 1, inner, words)
    target = _new_matrix(result, rows, count, result.shape[1], 1, words)
    failed = _mm_out(target, source, transposed)
    for i in range(rows):
        for j in range(count):
            out[first + i, start + j] = narrow(result[i, j], out)
    _delete_tensor(source)
    _delete_tensor(transposed)
    _delete_tensor(target)
    return failed


@compiled
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


@compiled
def product(x, rows, weights, group, out):
    """out[:rows] = x[:rows] times weights stacked along their outputs: [pieces, 3] of (handle, handle of scales, outputs).

    group: handle of the group size of packed INT4 weights, 0 for one dense weight (transposed, [in, out]); a dense one that is
    widened has the address of its bf16 [out, in] in place of scales. Returns 0 when torch computed it.
    """
    words = np.empty(8, np.int64)
    failed, column = 0, 0
    if group:
        for piece in range(weights.shape[0]):
            columns = weights[piece, 2]
            failed |= _packed_rows(x, 0, rows, weights[piece, 0], weights[piece, 1], group, out, column, columns, words)
            column += columns
        return failed
    if weights[0, 1]:
        return _widened_rows(x, 0, rows, weights[0, 1], weights[0, 2], out, words)
    source = _new_rows(x, 0, 0, rows, x.shape[1], words)
    target = _new_rows(out, 0, 0, rows, out.shape[1], words)
    failed = _mm_out(target, source, weights[0, 0])
    _delete_tensor(source)
    _delete_tensor(target)
    return failed


@compiled
def expert_products(x, first, sizes, weights, stacked, group, out):
    """out[first[e] : + sizes[e]] = x[the same rows] times expert e's weight, weights [E, 3] as in `product`.

    stacked: handle of all dense weights [E, in, out]; used when every expert has equally many rows. 0 where they are widened.
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
        elif sizes[e] and weights[e, 1]:
            failed |= _widened_rows(x, first[e], sizes[e], weights[e, 1], weights[e, 2], out, words)
        elif sizes[e]:
            source = _new_rows(x, first[e], 0, sizes[e], x.shape[1], words)
            target = _new_rows(out, first[e], 0, sizes[e], out.shape[1], words)
            failed |= _mm_out(target, source, weights[e, 0])
            _delete_tensor(source)
            _delete_tensor(target)
    return failed
