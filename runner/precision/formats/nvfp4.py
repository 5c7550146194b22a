"""nvfp4: e2m1 values (W4A16), an e4m3 scale per 16 weights, an fp32 scale over the whole weight. The numbers: ../fp4.py.

weight_packed uint8 [out, in / 2], weight_scale e4m3 [out, in / 16], weight_global_scale fp32 [1]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.precision.formats import Part, Readable, Scales, Scheme, Shape
from runner.precision.formats.mxfp4 import Fp4
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch

GROUP = 16


class Nvfp4(Fp4):
    name = "nvfp4"
    scale_dtype = "float8_e4m3fn"
    part_names = ("weight_packed", "weight_scale", "weight_global_scale")
    has_global_scale = True
    fixed_group = GROUP
    container = "nvfp4-pack-quantized"
    # seen in tests/test_convert_proof.py
    expert_note = (
        "do not load this with transformers 5.19: it leaves out the weight_global_scale of NVFP4 experts and computes with wrong "
        "weights; runner reads it, and gate_proj and up_proj share one global scale, as SGLang demands"
    )

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("weight_packed", "uint8", (rows, columns // 2)),
            Part("weight_scale", "float8_e4m3fn", (rows, columns // GROUP)),
            Part("weight_global_scale", "float32", (1,)),
        )

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        packed, scale, global_scale = super().readable(tensor_format, shape)
        return packed, scale, global_scale._replace(shapes=((1,), ()))

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        return self._packed(parts) and "weight_global_scale" in parts

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        from runner.precision import fp4

        code, scale, global_scale = fp4.quantize_nvfp4(weight, *(kept or (None, None)))
        return {"weight_packed": fp4.pack(code), "weight_scale": scale, "weight_global_scale": global_scale}

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import fp4

        return fp4.dequantize_nvfp4(self.values(parts), scales.scale, parts["weight_global_scale"])

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        from runner.precision import fp4

        code, scale, global_scale = fp4.quantize_nvfp4(weight, *(kept or (None, None)))
        return fp4.dequantize_nvfp4(code, scale, global_scale), Scales(scale, global_scale)

    def shared_scales(self, weights: Mapping[str, torch.Tensor]) -> dict[str, Scales]:
        """SGLang 0.5.23 keeps one global scale per matrix and refuses weight-only checkpoints whose weights disagree about it
        (read in its source)."""
        import torch

        from runner.precision import checks, fp4

        amax = torch.stack([checks.named(name, fp4.nvfp4_amax, weight) for name, weight in weights.items()]).amax(0)
        shared = fp4.nvfp4_global_scale(amax)
        return {name: Scales(fp4.nvfp4_scales(weight, shared), shared.clone()) for name, weight in weights.items()}

    def scheme(self, tensor_format: TensorFormat) -> dict[str, Any]:
        more = {"strategy": "tensor_group", "group_size": GROUP, "scale_dtype": "torch.float8_e4m3fn"}
        return super().scheme(tensor_format) | more

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        found = (scheme.kind, scheme.bits, scheme.strategy, scheme.group) == ("float", self.bits, "tensor_group", GROUP)
        return TensorFormat.nvfp4() if found else None


FORMAT = Nvfp4()
