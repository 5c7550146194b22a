"""The in-process engine's kernels, for `doctor engine`."""

from __future__ import annotations

import torch

from runner.config.choices import DeviceKind
from runner.config.schema import Config
from runner.data import ExportedTensor
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.option import LocalRolloutConfig
from runner.rollout.local.pool import LocalPool, torch_device
from runner.rollout.local.weights import Int4Weight, ResidentWeight, resident_weight


class LocalKernel:
    """A resident weight of the engine. Its int4 kernel keeps fp32 products on a CPU and rounds them to bf16 on CUDA;
    everything else multiplies bf16 weights, which hold rounded products already."""

    def __init__(self, weight: ResidentWeight, device: torch.device) -> None:
        self.weight = weight
        self.kind = weight.kind
        self.product_rounding = "fp32" if isinstance(weight, Int4Weight) and device.type == "cpu" else "bf16"

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.linear(x)


class LocalProbe:
    name = "local"

    def __init__(self, cfg: Config) -> None:
        self.device = torch_device(cfg.rollout.device if isinstance(cfg.rollout, LocalRolloutConfig) else DeviceKind.auto)

    def kernel(self, exported: ExportedTensor, shape: tuple[int, int], tensor_format: TensorFormat) -> LocalKernel:
        names, rows = (exported.name,), (shape[0],)
        weight = resident_weight(names, rows, shape[1], tensor_format, torch.bfloat16, self.device)
        weight.load(weight.repack([exported]))
        return LocalKernel(weight, self.device)

    def pool(self, cfg: Config) -> LocalPool | None:
        return LocalPool(cfg) if cfg.model.hf_checkpoint is None else None
