"""fp8: e4m3 values (W8A8), with an fp32 scale per 128 x 128 block, per row or per tensor. The numbers: ../fp8.py.

weight e4m3 [out, in]; blocks: weight_scale_inv fp32 [out / 128, in / 128], rounded up; channel: weight_scale fp32 [out, 1];
tensor: weight_scale fp32 [1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.config.choices import Fp8Matmul
from runner.config.schema import Config, Convention, QatPlacement
from runner.errors import UserError
from runner.precision.formats import FLOATS, FormatSpec, Part, Readable, Scales, Scheme, Shape
from runner.precision.quantization_config import module_names
from runner.precision.tensor_format import TensorFormat

if TYPE_CHECKING:
    import torch

    from runner.models.family import Parameter

BLOCK = 128


class Fp8(FormatSpec):
    name = "fp8"
    bits = 8
    scale_dtype = "float32"
    part_names = ("weight", "weight_scale", "weight_scale_inv")
    fixed_group = BLOCK
    strategies = ("block", "channel", "tensor")
    container = "float-quantized"
    methods = ("fp8",)
    quantizes_activations = True

    def grid(self, group_size: int, convention: Convention | None, strategy: str) -> TensorFormat:
        if strategy not in self.strategies:
            raise UserError(f"fp8 scales are per block, channel or tensor, not {strategy}")
        return TensorFormat(self.name, BLOCK if strategy == "block" else -1, None, strategy)

    def words(self, tensor_format: TensorFormat) -> list[str]:
        return [f"per {tensor_format.strategy}"]

    def rules(self, cfg: Config, weights: Sequence[Parameter]) -> Iterator[UserError]:
        precision = cfg.precision
        if precision.fp8_param_gather and cfg.trainer.optimizer.cpu_offload:
            yield UserError(
                "FP8 parameter gather excludes a CPU-offloaded Adam",
                key="precision.fp8_param_gather",
                fix="trainer.optimizer.cpu_offload=false or precision.fp8_param_gather=false",
            )
        needed = f"needs FP8 training, but precision={precision.name} trains in {precision.train.format}"
        for option in ("fp8_param_gather", "fp8_backward"):
            if getattr(precision, option) and precision.train.format != self.name:
                yield UserError(needed, key=f"precision.{option}", fix=f"precision=fp8, or precision.{option}=false")
        if precision.fp8_matmul == Fp8Matmul.scaled_mm:
            key, back = "precision.fp8_matmul", "precision.fp8_matmul=simulated"
            if precision.train.format == self.name:
                yield from self._scaled_matmul(cfg, weights, key, back)
            else:
                yield UserError(needed, key=key, fix=back)

    def _scaled_matmul(self, cfg: Config, weights: Sequence[Parameter], key: str, back: str) -> Iterator[UserError]:
        """torch's blockwise FP8 matmul: what of it can be known without a look at the GPU (../fp8_matmul.py knows the rest)."""
        if cfg.precision.qat_placement is QatPlacement.forward:
            problem = "multiplies the FP8 weights that are kept between optimizer steps"
            yield UserError(problem, key=key, fix="precision.qat_placement=in_place")
        shapes = {p.shape: p for p in weights if any(size % BLOCK for size in p.shape)}
        if shapes:
            shown = ", ".join(f"{p.role.name} {p.name.split('.')[-2]} {list(shape)}" for shape, p in shapes.items())
            yield UserError(f"FP8 matmuls need dimensions in multiples of {BLOCK}: {shown}", key=key, fix=back)

    def parts(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Part, ...]:
        suffix = "weight_scale_inv" if tensor_format.strategy == "block" else "weight_scale"
        return Part("weight", "float8_e4m3fn", shape), Part(suffix, "float32", scale_shape(shape, tensor_format.strategy))

    def readable(self, tensor_format: TensorFormat, shape: Shape) -> tuple[Readable, ...]:
        values, scale = self.parts(tensor_format, shape)
        others: dict[str, tuple[Shape, ...]] = {"channel": (shape[:1],), "tensor": ((), (1, 1)), "block": ()}
        shapes = (scale.shape, *others[tensor_format.strategy])
        return (
            Readable((values.name,), (values.dtype,), (values.shape,)),
            Readable(("weight_scale", "weight_scale_inv"), (*FLOATS, "float8_e8m0fnu"), shapes),
        )

    def holds(self, parts: Mapping[str, torch.Tensor]) -> bool:
        import torch

        return "weight" in parts and parts["weight"].dtype is torch.float8_e4m3fn

    def encode(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> dict[str, torch.Tensor]:
        from runner.precision import fp8

        values, scale = fp8.quantize(weight, tensor_format.strategy, kept and kept.scale)
        return {"weight": values, "weight_scale_inv" if tensor_format.strategy == "block" else "weight_scale": scale}

    def values(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"]

    def decode(self, parts: Mapping[str, torch.Tensor], scales: Scales, tensor_format: TensorFormat) -> torch.Tensor:
        from runner.precision import fp8

        return fp8.dequantize(parts["weight"], scales.scale, tensor_format.strategy)

    def quantize_dequantize(
        self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None
    ) -> tuple[torch.Tensor, Scales]:
        from runner.precision import fp8

        values, scale = fp8.quantize_dequantize(weight, tensor_format.strategy, kept and kept.scale)
        return values, Scales(scale)

    def quantize_dequantize_(self, weight: torch.Tensor, tensor_format: TensorFormat, kept: Scales | None) -> Scales:
        from runner.precision import kernels

        on_gpu = kernels.for_fp8(weight) if tensor_format.strategy == "block" else None
        if on_gpu is None or not on_gpu.suits_weight(weight):
            return super().quantize_dequantize_(weight, tensor_format, kept)
        return Scales(on_gpu.quantize_dequantize_(weight, kept and kept.scale))

    def quantization_config(self, tensor_format: TensorFormat, ignored: list[str]) -> dict[str, Any]:
        if tensor_format.strategy != "block":
            return super().quantization_config(tensor_format, ignored)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ignored,
        }

    def activations(self, tensor_format: TensorFormat) -> dict[str, Any] | None:
        strategy = "token" if tensor_format.strategy == "channel" else "tensor"
        return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": True, "observer": None}

    def read_scheme(self, scheme: Scheme) -> TensorFormat | None:
        if scheme.kind != "float" or scheme.bits != self.bits or scheme.strategy not in self.strategies:
            return None
        block = scheme.entry.get("block_structure")
        if scheme.strategy == "block" and block != [BLOCK, BLOCK]:
            raise UserError(f"quantization_config: block_structure is {block!r:.80}; readable is [{BLOCK}, {BLOCK}]")
        return TensorFormat.fp8(scheme.strategy)

    def config_reader(self, config: Mapping[str, Any]) -> Callable[[str], TensorFormat]:
        """Of DeepSeek-V3's and transformers' own `quant_method: fp8`."""
        block = config.get("weight_block_size")
        if block not in (None, [BLOCK, BLOCK]):
            raise UserError(f"quantization_config.weight_block_size is {block!r:.80}; readable is [{BLOCK}, {BLOCK}]")
        if config.get("fmt", "e4m3") != "e4m3":
            raise UserError(f"quantization_config.fmt is {config['fmt']!r:.80}; readable is 'e4m3'")
        grid = TensorFormat.fp8("block" if block else "tensor")
        entries = frozenset(entry.strip(".") for entry in module_names(config, "modules_to_not_convert"))

        def format_of(module: str) -> TensorFormat:
            # whole dotted components: `mlp.gate` must not swallow `mlp.gate_up_proj`
            parts = module.split(".")
            runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
            return TensorFormat.bf16() if any(run in entries for run in runs) else grid

        return format_of


def scale_shape(shape: Shape, strategy: str, block: int = BLOCK) -> Shape:
    """Shape of the scales of a weight [..., out, in]."""
    *leading, rows, columns = shape
    match strategy:
        case "block":
            return (*leading, -(-rows // block), -(-columns // block))
        case "channel":
            return (*leading, rows, 1)
        case "tensor":
            return (*leading, 1)
    raise ValueError(f"unknown fp8 strategy {strategy}")


FORMAT = Fp8()
