"""Resident weights of the local engine: one class per way of computing, each made from on-disk parts.

Shape legend: N out features, K in features, G groups along K, M rows of the input.

    DenseWeight      bf16 (or fp32): one matrix in the model's dtype
    Int4Weight       packed integers and scales in the layout of torch's weight-only int4 matmul; nothing dequantized is resident
    TransientWeight  fp8, mxfp4, nvfp4, and int4 shapes outside the kernel's limits: the on-disk parts are resident, the
                     effective bf16 weight exists only during its matmul. fp8: the input is quantized too (W8A8)
A weight may be several on-disk weights stacked along N (gate_proj above up_proj).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from runner.data import ExportedTensor
from runner.precision.codec import decode, integers, scales_of
from runner.precision.fp8 import quantize_dequantize_activations
from runner.precision.tensor_format import TensorFormat
from runner.weights.bits import same_bits

INT4_KERNEL_GROUPS = (32, 64, 128, 256)
INT4_ROWS_PER_CALL = 64  # the CPU kernel is built for few rows: 8 calls of 64 rows take a tenth of one call of 512
Tensors = dict[str, torch.Tensor]


def int4_kernel_limits(shape: tuple[int, int], tensor_format: TensorFormat, dtype: torch.dtype, device: torch.device) -> str:
    """Why torch's int4 matmul cannot take this weight; "" when it can."""
    rows, columns = shape
    if dtype != torch.bfloat16:
        return f"activations are {dtype}, the kernel takes bfloat16"
    if tensor_format.group_size not in INT4_KERNEL_GROUPS:
        return f"group size {tensor_format.group_size} is not one of {', '.join(map(str, INT4_KERNEL_GROUPS))}"
    if device.type == "cuda":
        if rows % 8 or columns % 32:
            return f"shape {shape}: out must be a multiple of 8 and in of 32"
    elif rows % 16:
        return f"shape {shape}: out must be a multiple of 16"
    return ""


class ResidentWeight:
    """One matmul weight [N, K] of the engine. `tensors` is all that is resident of it, in the kernel's layout."""

    kind: str

    def __init__(self, names: tuple[str, ...], rows: tuple[int, ...], columns: int, tensor_format: TensorFormat) -> None:
        self.names, self.rows, self.columns, self.format = names, rows, columns, tensor_format
        self.tensors: Tensors = {}

    def repack(self, exported: list[ExportedTensor]) -> Tensors:
        """On-disk parts -> tensors in the resident layout (new tensors); the engine's only way to make them."""
        raise NotImplementedError

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """x [M, K] @ W.T -> [M, N] in x's dtype."""
        raise NotImplementedError

    def load(self, fresh: Tensors) -> None:
        """In place once there is something: compiled code knows the tensors by their addresses."""
        if not self.tensors:
            self.tensors = fresh
        for key, tensor in fresh.items():
            self.tensors[key].copy_(tensor)

    def differences(self, fresh: Tensors) -> list[str]:
        """Names of resident tensors whose bits differ from a fresh repack of what was received."""
        return [key for key in fresh if key not in self.tensors or not same_bits(self.tensors[key], fresh[key])]


class DenseWeight(ResidentWeight):
    """A plain matrix. `target`, when given, is the model's own parameter (or a view into it), which is written in place."""

    kind = "dense"

    def __init__(
        self,
        names: tuple[str, ...],
        rows: tuple[int, ...],
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        target: torch.Tensor | None = None,
    ) -> None:
        super().__init__(names, rows, columns, TensorFormat.bf16())
        weight = torch.zeros(sum(rows), columns, dtype=dtype, device=device) if target is None else target
        self.tensors = {"weight": weight}

    def repack(self, exported: list[ExportedTensor]) -> Tensors:
        resident = self.tensors["weight"]
        parts = [item.parts[item.name].detach().to(resident.device, resident.dtype) for item in exported]
        return {"weight": parts[0] if len(parts) == 1 else torch.cat(parts)}

    def load(self, fresh: Tensors) -> None:
        self.tensors["weight"].copy_(fresh["weight"])

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors["weight"])


class Int4Weight(ResidentWeight):
    """Packed INT4 for `aten._weight_int4pack_mm[_for_cpu]`: w = (q - 8) * scale + zero, with zero = 0.

    integers: CPU uint8 [N, K / 2], CUDA int32 tiles; scales: bf16 [G, N, 2] (scale, zero), as the kernel takes them.
    The CPU kernel multiplies fp32(q * scale), the CUDA kernel rounds that product to bf16.
    """

    kind = "int4_kernel"

    def __init__(
        self, names: tuple[str, ...], rows: tuple[int, ...], columns: int, tensor_format: TensorFormat, device: torch.device
    ) -> None:
        super().__init__(names, rows, columns, tensor_format)
        self.device = device
        self.group = tensor_format.group_size

    def repack(self, exported: list[ExportedTensor]) -> Tensors:
        codes = torch.cat([integers(item, self.format) for item in exported]).to(self.device, torch.int32) + 8
        scale = torch.cat([scales_of(item).scale for item in exported]).to(self.device, torch.bfloat16)
        if self.device.type == "cuda":
            pairs = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8)
            tiles = next(tiles for tiles in (8, 4, 2) if self.columns % (tiles * 16) == 0)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
        pairs = torch.stack((scale, torch.zeros_like(scale)), -1)
        return {"integers": packed, "scales": pairs.transpose(0, 1).contiguous()}

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        packed, scales = self.tensors["integers"], self.tensors["scales"]
        if x.device.type == "cuda":
            return torch.ops.aten._weight_int4pack_mm(x, packed, self.group, scales)
        matmul = torch._weight_int4pack_mm_for_cpu  # torch.ops.aten's, at half the price of a call
        if x.shape[0] <= INT4_ROWS_PER_CALL:
            return matmul(x, packed, self.group, scales)
        return torch.cat([matmul(rows, packed, self.group, scales) for rows in x.split(INT4_ROWS_PER_CALL)])


class TransientWeight(ResidentWeight):
    """Resident on-disk parts; `decode` gives the effective bf16 weight for the length of one matmul."""

    kind = "transient"

    def __init__(
        self, names: tuple[str, ...], rows: tuple[int, ...], columns: int, tensor_format: TensorFormat, device: torch.device
    ) -> None:
        super().__init__(names, rows, columns, tensor_format)
        self.device = device
        self.exported: list[ExportedTensor] = []

    def repack(self, exported: list[ExportedTensor]) -> Tensors:
        return {name: part.detach().to(self.device, copy=True) for item in exported for name, part in item.parts.items()}

    def load(self, fresh: Tensors) -> None:
        self.tensors = fresh
        self.exported = []
        for name in self.names:
            module = name.removesuffix(".weight")
            parts = {part: tensor for part, tensor in fresh.items() if part.startswith(module + ".")}
            self.exported.append(ExportedTensor(name, self.format.format, parts))

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        if self.format.format == "fp8":  # an FP8 matmul takes FP8 on both sides: 1 x 128 groups, scaled as they come
            x = quantize_dequantize_activations(x)
        weights = [decode(item, self.format) for item in self.exported]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return F.linear(x, weight.to(x.dtype))


def resident_weight(
    names: tuple[str, ...],
    rows: tuple[int, ...],
    columns: int,
    tensor_format: TensorFormat,
    dtype: torch.dtype,
    device: torch.device,
) -> ResidentWeight:
    """The way this engine computes with a weight of this format and shape."""
    if not tensor_format.quantized:
        return DenseWeight(names, rows, columns, dtype, device)
    if tensor_format.format == "int4" and not int4_kernel_limits((sum(rows), columns), tensor_format, dtype, device):
        return Int4Weight(names, rows, columns, tensor_format, device)
    return TransientWeight(names, rows, columns, tensor_format, device)
