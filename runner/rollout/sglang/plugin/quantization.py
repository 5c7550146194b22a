"""W4A16 and block FP8 checkpoints on a CPU without AMX kernels: quantized values stay resident, their products compute.

The on-disk integers and scales stay the module's parameters, so weight updates and the residency check address them. After
every load the effective weights bf16(q * scale) are derived from them once (`module.effective`), by the project's reference
implementation, and the matmuls use those: for W4A16 that is the same arithmetic as a kernel that rounds products to bf16;
FP8 leaves out the quantization of activations.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from runner.precision import fp8, int4

Effective = dict[str, torch.Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # of activations; float32 serves exact comparisons


def register() -> None:
    if torch.cuda.is_available():
        raise RuntimeError("runner's CPU twin of SGLang does not load where CUDA is present")
    _compressed_tensors()
    _fp8()


def _compressed_tensors() -> None:
    from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors
    from sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import CompressedTensorsWNA16
    from sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe import CompressedTensorsWNA16MoE

    compressed_tensors.CompressedTensorsConfig._check_scheme_supported = lambda self, *args, **kwargs: True
    compressed_tensors.CompressedTensorsConfig.get_supported_act_dtypes = classmethod(lambda cls: DTYPES)
    linear, experts = CompressedTensorsWNA16, CompressedTensorsWNA16MoE
    linear.process_weights_after_loading = lambda self, module: _derive(module, _int4_linear)
    linear.apply_weights = lambda self, module, x, bias=None: F.linear(x, module.effective["weight"], bias)
    experts.process_weights_after_loading = lambda self, module: _derive(module, _int4_experts)
    experts.restore_weights_before_loading = lambda self, module: None  # nothing was repacked
    experts.create_moe_runner = _keep_runner_config
    experts.apply_weights = _run_experts


def _fp8() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod

    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: DTYPES)
    Fp8LinearMethod.process_weights_after_loading = lambda self, module: _derive(module, _fp8_linear)
    Fp8LinearMethod.apply = lambda self, module, x, bias=None: F.linear(x, module.effective["weight"], bias)
    Fp8MoEMethod.process_weights_after_loading = lambda self, module: _derive(module, _fp8_experts)
    Fp8MoEMethod.create_moe_runner = _keep_runner_config
    Fp8MoEMethod.apply = _run_experts


def _derive(module: Any, derive: Any) -> None:
    """Also remembers how: the residency check derives again and compares bits."""
    dtype = torch.get_default_dtype() if not hasattr(module, "effective") else next(iter(module.effective.values())).dtype
    module.derive_effective = lambda: {name: weight.to(dtype) for name, weight in derive(module).items()}
    module.effective = module.derive_effective()


def _int4_linear(module: Any) -> Effective:
    packed, scale = module.weight_packed.data, module.weight_scale.data
    return {"weight": _effective_int4(packed, scale)}


def _int4_experts(module: Any) -> Effective:
    """Stacked experts lie transposed: packed [E, K / 8, N], scales [E, G, N]."""
    return {
        name: _effective_int4(
            getattr(module, f"{name}_packed").data.transpose(1, 2), getattr(module, f"{name}_scale").data.transpose(1, 2)
        )
        for name in ("w13_weight", "w2_weight")
    }


def _effective_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[.., N, K / 8] int32 and [.., N, G] -> bf16(q * scale) [.., N, K]; scales are bf16 values in any dtype."""
    return int4.dequantize(int4.unpack(packed, packed.shape[-1] * 8), scale.to(torch.bfloat16))


def _fp8_linear(module: Any) -> Effective:
    return {"weight": fp8.dequantize(module.weight.data, module.weight_scale_inv.data)}


def _fp8_experts(module: Any) -> Effective:
    """gate above up in one stack: their blocks are separate where the expert's width is a multiple of 128."""
    return {
        name: fp8.dequantize(getattr(module, name).data, getattr(module, f"{name}_scale_inv").data)
        for name in ("w13_weight", "w2_weight")
    }


def _keep_runner_config(self: Any, module: Any, moe_runner_config: Any) -> None:
    self.moe_runner_config = moe_runner_config


def _run_experts(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """By these names: SGLang's FP8 experts are called with keywords."""
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    weights = SimpleNamespace(**layer.effective, num_experts=layer.effective["w2_weight"].shape[0])
    hidden = moe_forward_native(weights, dispatch_output.hidden_states, dispatch_output.topk_output, self.moe_runner_config)
    return StandardCombineInput(hidden_states=hidden)
