"""FP8 training in the torch trainer: every matmul with an FP8 weight takes FP8 activations (1 x 128) and weights (128 x 128).

    forward     y  = Q(x) W^T               W = Q(w), in the model's weights already (torch_qat.py)
    backward    dx = G(dy) W,  dw = G(dy)^T Q(x)

Q(x) quantizes 1 x 128 along the features; G does so with fp8_backward and is the identity without; the gradients of Q pass
straight through. precision.fp8_matmul chooses how: `simulated` quantize-dequantizes to bf16 and multiplies in bf16, on any
device; `scaled_mm` multiplies y, and with fp8_backward dx, in FP8 on a Hopper GPU, without rounding Q(w) to bf16 in between.
dw is a bf16 matmul of dequantized operands in both: its contraction runs over tokens, along which nothing here is grouped.

Shape legend: M rows (tokens), K inputs, N outputs, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from runner.config.choices import Fp8Matmul
from runner.config.schema import PrecisionConfig
from runner.errors import UserError
from runner.precision import fp8, fp8_matmul
from runner.trainer import experts
from runner.trainer.torch.qat import WeightLayout, WeightQuantizer


class QuantizeActivation(torch.autograd.Function):
    """FP8 1 x 128 quantize-dequantize of activations [..., features]; the gradient passes (straight-through)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return fp8.quantize_dequantize_activations(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class QuantizeGradient(torch.autograd.Function):
    """Identity whose gradient [..., features] is quantize-dequantized in FP8, 1 x 128, before both backward matmuls."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return fp8.quantize_dequantize_activations(grads[0])


class ScaledMatmul(torch.autograd.Function):
    """x [M, K] times an FP8 weight [N, K] with scaled_mm; the weight's gradient goes to `weight` (straight-through)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, backward: bool
    ) -> torch.Tensor:
        q, scale = fp8.quantize_activations(x)
        ctx.save_for_backward(q, scale, weight, weight_q, weight_scale)
        ctx.fp8_backward = backward
        return fp8_matmul.matmul(q, scale, weight_q, weight_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        q, scale, weight, weight_q, weight_scale = ctx.saved_tensors
        grad = grads[0]
        if ctx.fp8_backward:
            grad_q, grad_scale = fp8.quantize_activations(grad)
            grad_input = fp8_matmul.matmul(grad_q, grad_scale, *fp8_matmul.transposed(weight_q, weight_scale)).to(grad.dtype)
            grad = fp8.dequantize_activations(grad_q, grad_scale, dtype=grad.dtype)
        else:
            grad_input = grad @ weight
        return grad_input, grad.t() @ fp8.dequantize_activations(q, scale, dtype=grad.dtype), None, None, None


class GroupedScaledMatmul(torch.autograd.Function):
    """`ScaledMatmul` of experts: x [M, K] in expert order, `ends` int32 [E], weights [E, N, K]. Nobody waits for a count."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_q: torch.Tensor,
        weight_scale: torch.Tensor,
        ends: torch.Tensor,
        backward: bool,
    ) -> torch.Tensor:
        q, scale = fp8.quantize_activations(x)
        ctx.save_for_backward(q, scale, weight, weight_q, weight_scale, ends)
        ctx.fp8_backward = backward
        return fp8_matmul.grouped(q, scale, weight_q, weight_scale, ends).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        q, scale, weight, weight_q, weight_scale, ends = ctx.saved_tensors
        grad = grads[0]
        if ctx.fp8_backward:
            grad_q, grad_scale = fp8.quantize_activations(grad)
            weight_q, weight_scale = fp8_matmul.transposed(weight_q, weight_scale)
            grad_input = fp8_matmul.grouped(grad_q, grad_scale, weight_q, weight_scale, ends).to(grad.dtype)
            grad = fp8.dequantize_activations(grad_q, grad_scale, dtype=grad.dtype)
        else:
            grad_input = F.grouped_mm(grad, weight, offs=ends)
        seen = fp8.dequantize_activations(q, scale, dtype=grad.dtype)
        return grad_input, F.grouped_mm(grad.t(), seen, offs=ends), None, None, None, None


class Fp8Weight:
    """e4m3 values and block scales of one weight of the model [..., N, K], derived anew when the weight was written."""

    def __init__(self, name: str, layout: WeightLayout, quantizer: WeightQuantizer) -> None:
        self.name, self._layout, self._quantizer = name, layout, quantizer
        self._version = -1
        self._operand: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def operand(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(e4m3 [..., N, K], fp32 scales [..., N / 128, K / 128]); None while the weight holds unquantized masters, which
        have no FP8 form (logprobs with weights="master")."""
        if weight._version == self._version:
            return self._operand
        self._version, self._operand = weight._version, None
        if not self._quantizer.holds_effective(self.name, weight):
            return None
        parts = [
            fp8.regrid(view, self._quantizer.scales[self.name, rows].scale)
            for rows, view in self._layout.parts(self.name, weight)
        ]
        # values are joined as bytes: not every build of torch concatenates FP8
        values = torch.cat([part[0].view(torch.uint8) for part in parts], -2).view(torch.float8_e4m3fn)
        self._operand = values, torch.cat([part[1] for part in parts], -2)
        return self._operand


class Fp8Matmuls:
    """The matmuls of one module whose weights are FP8, simulated in bf16."""

    def __init__(self, *, backward: bool) -> None:
        self.backward = backward

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return QuantizeActivation.apply(x)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return QuantizeGradient.apply(y) if self.backward else y

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[..., K] by [N, K] -> [..., N]."""
        y = self.after(F.linear(self.before(x), weight))
        return y if bias is None else y + bias

    def grouped(self, attribute: str, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """rows [M, K] in expert order, `ends` int32 [E] by `weight` [E, N, K], the module's `attribute` -> [M, N]."""
        return self.after(F.grouped_mm(self.before(rows), weight.transpose(-2, -1), offs=ends))


class ScaledFp8Matmuls(Fp8Matmuls):
    """The same on a GPU with FP8 matmuls."""

    def __init__(self, weights: dict[str, Fp8Weight], *, backward: bool) -> None:
        super().__init__(backward=backward)
        self.weights = weights  # attribute of the module -> its FP8 form

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        operand = self.weights["weight"].operand(weight)
        if operand is None:
            return super().linear(x, weight, bias)
        y = ScaledMatmul.apply(x.reshape(-1, x.shape[-1]), weight, *operand, self.backward)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias

    def grouped(self, attribute: str, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        operand = self.weights[attribute].operand(weight)
        if operand is None:
            return super().grouped(attribute, rows, weight, ends)
        return GroupedScaledMatmul.apply(rows, weight, *operand, ends, self.backward)


def install_fp8_matmuls(
    model: nn.Module, layout: WeightLayout, quantizer: WeightQuantizer, precision: PrecisionConfig, device: torch.device
) -> None:
    """Every matmul with an FP8 weight becomes an FP8 matmul: linears by their forward, experts through their own function.

    Raises UserError where `precision.fp8_matmul=scaled_mm` cannot be had on this device.
    """
    scaled = precision.fp8_matmul == Fp8Matmul.scaled_mm
    reason = fp8_matmul.missing(device) if scaled else None
    if reason:
        raise UserError(reason, key="precision.fp8_matmul", fix="precision.fp8_matmul=simulated")
    by_module: dict[str, dict[str, Fp8Weight]] = {}
    for name in layout.quantized:
        module_name, _, attribute = name.rpartition(".")
        by_module.setdefault(module_name, {})[attribute] = Fp8Weight(name, layout, quantizer)
    for module_name, weights in by_module.items():
        module = model.get_submodule(module_name)
        backward = precision.fp8_backward
        matmuls = ScaledFp8Matmuls(weights, backward=backward) if scaled else Fp8Matmuls(backward=backward)
        if isinstance(module, nn.Linear):
            module.__dict__["forward"] = _linear_forward(module, matmuls)
        else:
            module.__dict__[experts.FP8_ATTRIBUTE] = matmuls


def _linear_forward(module: nn.Linear, matmuls: Fp8Matmuls) -> Any:
    # weight and bias are looked up at every call: fake quantization in the forward puts another weight in their place
    return lambda x: matmuls.linear(x, module.weight, module.bias)
