"""The fp32 masters and Adam moments behind a rank's parameters, wherever Megatron's optimizers keep them.

Three cases: DistributedOptimizer holds flat shards over data-parallel ranks (in its own lists, or inside a precision-aware or
CPU-offloaded optimizer); Float16Optimizer holds whole masters; FP32Optimizer trains the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = ("param", *MOMENTS)


@dataclass(frozen=True)
class Owned:
    """Elements [start, stop) of a flattened parameter whose master this rank owns, and the optimizer that has it."""

    parameter: nn.Parameter
    start: int
    stop: int
    optimizer: Any

    @property
    def view(self) -> torch.Tensor:
        """The owned elements of the model weight, writable."""
        return self.parameter.data.view(-1)[self.start : self.stop]

    @property
    def sharded(self) -> bool:
        return isinstance(self.optimizer, DistributedOptimizer)

    def leaf(self) -> torch.Tensor:
        """What the inner optimizer steps: its state's key."""
        if self.sharded:
            group, order = self.optimizer.model_param_group_index_map[self.parameter]
            return self.optimizer.optimizer.param_groups[group]["params"][order]
        master = getattr(self.parameter, "main_param", None)
        return self.parameter if master is None else master

    def tensors(self) -> dict[str, torch.Tensor]:
        """`param` (the master), and after the first step `exp_avg`, `exp_avg_sq`, each flat [stop - start] fp32."""
        if self.sharded and self.optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            found = self.optimizer._get_main_param_and_optimizer_states(self.parameter)
        else:
            leaf = self.leaf()
            found = {"param": leaf.detach(), **self.optimizer.optimizer.state.get(leaf, {})}
        return {key: found[key].view(-1) for key in STATES if key in found}

    def step_count(self) -> float:
        """Adam's step of this parameter; 0 before the first."""
        state = self.optimizer.optimizer.state.get(self.leaf(), {})
        return float(state["step"]) if "step" in state else float(self._group().get("step", 0))

    def _group(self) -> dict[str, Any]:
        leaf = self.leaf()
        groups = self.optimizer.optimizer.param_groups
        return next(group for group in groups if any(parameter is leaf for parameter in group["params"]))

    def restore(self, tensors: dict[str, torch.Tensor], step: float) -> None:
        """Inverse of `tensors` and `step_count`. Every leaf gets a step tensor of its own: torch's Adam counts in place, so one
        that is shared would advance once per parameter."""
        if self.sharded and self.optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            self.optimizer._set_main_param_and_optimizer_states(self.parameter, tensors)
            self._group()["step"] = int(step)
            return
        leaf = self.leaf()
        leaf.data.view(-1).copy_(tensors["param"])
        state = self.optimizer.optimizer.state
        if not step:
            state.pop(leaf, None)
            return
        fresh = state.setdefault(leaf, {})
        for moment in MOMENTS:
            if moment not in fresh:
                fresh[moment] = torch.zeros_like(leaf.data)
            fresh[moment].view(-1).copy_(tensors[moment])
        if isinstance(self.optimizer.optimizer, torch.optim.Optimizer) and type(self.optimizer.optimizer) is torch.optim.AdamW:
            fresh["step"] = torch.tensor(float(step), dtype=torch.float32)
        else:
            self._group()["step"] = int(step)


class Masters:
    """What one rank owns. `has_masters` False: the model's fp32 weights are trained directly."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        chained = getattr(optimizer, "chained_optimizers", [optimizer])
        self.optimizers = [o for o in chained if not getattr(o, "is_stub_optimizer", False)]
        self.owned = [owned for o in self.optimizers for owned in _owned(o)]
        self.has_masters = not any(isinstance(o, FP32Optimizer) for o in self.optimizers)
        if self.has_masters:
            self.has_masters = all(owned.parameter.dtype is not torch.float32 for owned in self.owned)

    @torch.no_grad()
    def write(self) -> None:
        """bf16(master) into the owned elements of the model weights; a gather brings them to the other ranks."""
        for owned in self.owned:
            master = owned.tensors()["param"]
            if master.data_ptr() != owned.view.data_ptr():
                owned.view.copy_(master)

    def reset_moments(self) -> None:
        """Moments and step counts from zero; masters stay."""
        for owned in self.owned:
            owned.restore({"param": owned.tensors()["param"].clone()}, 0.0)


def _owned(optimizer: Any) -> Iterator[Owned]:
    if isinstance(optimizer, DistributedOptimizer):
        for groups in (optimizer.model_float16_groups, optimizer.model_fp32_groups):
            for parameter in (parameter for group in groups for parameter in group):
                span = optimizer._get_model_param_range_map(parameter)["param"]
                yield Owned(parameter, span.start, span.end, optimizer)
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for groups in (optimizer.float16_groups, optimizer.fp32_from_fp32_groups):
            for parameter in (parameter for group in groups for parameter in group):
                yield Owned(parameter, 0, parameter.numel(), optimizer)
    else:
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield Owned(parameter, 0, parameter.numel(), optimizer)
