"""AdamW over fp32 master weights, with fp32 gradient accumulation, clipping and the learning-rate schedule.

Masters, gradients and moments are flat fp32 buffers with one view per parameter: an update of a small model is a
handful of kernel calls, whatever its number of parameters. Matrices get weight decay, vectors (norms, biases) do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from runner.config.choices import LrSchedule
from runner.config.schema import Config, OptimizerConfig
from runner.trainer.parking import tensors_of_optimizer

CLIP_EPSILON = 1e-6
FALLING = (LrSchedule.linear, LrSchedule.cosine)  # schedules whose plan has an end
MOMENTS = ("exp_avg", "exp_avg_sq")


def planned_steps(cfg: Config) -> int:
    """Optimizer steps over which the learning rate falls: lr_decay_steps, or the whole run."""
    planned = cfg.trainer.optimizer.lr_decay_steps
    return planned if isinstance(planned, int) else cfg.steps * cfg.algorithm.updates_per_rollout


def unfinished_warmup(cfg: Config) -> list[str]:
    """What to tell of a run that ends before its learning rate is up: no mistake in a first look of a few steps."""
    optimizer, steps = cfg.trainer.optimizer, cfg.steps * cfg.algorithm.updates_per_rollout
    planned, warmup = planned_steps(cfg) if optimizer.lr_schedule != "constant" else steps, optimizer.lr_warmup_steps
    if warmup > steps:
        return [f"the learning rate warms up over {warmup} updates and the run has {steps}"]
    if warmup > planned:
        end = learning_rate(optimizer, planned, planned)
        return [f"the learning rate warms up over {warmup} updates and its plan has {planned}; from then on it is {end:g}"]
    return []


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up over lr_warmup_steps, then the schedule down to lr_min_ratio * lr.

    Steps at and beyond `total_steps` (a run that was made longer) stay at the end value, or at the last rate of a warm-up that
    was not over by then where that is lower: a plan that has ended never goes up. `constant` has no end.
    """
    warmup = config.lr_warmup_steps
    if config.lr_schedule in FALLING and step >= total_steps:
        return config.lr * min(config.lr_min_ratio, total_steps / max(warmup, total_steps, 1))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == LrSchedule.constant:
        return config.lr
    progress = (step - warmup) / (total_steps - warmup)
    if config.lr_schedule == LrSchedule.linear:
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.lr_min_ratio + (1.0 - config.lr_min_ratio) * share)


class MasterOptimizer:
    """Owns masters, gradients and Adam moments of named parameters.

    With `master_weights` every parameter has an fp32 master that starts as a copy of it; `masters[name]` is the truth and
    the model weights are derived from it by the caller. Without, the parameters themselves are trained in their dtype.
    A parameter's gradient is added to its fp32 row as soon as autograd has it and is freed, so accumulation over
    micro-batches never rounds to bf16. With `cpu_offload` all of this lies in host memory.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, *, master_weights: bool) -> None:
        self.config = config
        self.has_masters = master_weights
        params = [(name, param) for name, param in named if param.requires_grad]
        matrix = {name: param.dim() >= 2 and not name.endswith("bias") for name, param in params}  # biases of experts lie stacked
        decayed = [(name, param) for name, param in params if matrix[name]]
        plain = [(name, param) for name, param in params if not matrix[name]]
        self.params = dict(decayed + plain)
        device = torch.device("cpu") if config.cpu_offload else next(iter(self.params.values())).device
        self._offsets: dict[str, int] = {}
        total = 0
        for name, param in self.params.items():
            self._offsets[name] = total
            total += param.numel()
        self._split = sum(param.numel() for _, param in decayed)
        self._flat_grad = torch.zeros(total, dtype=torch.float32, device=device)
        self.grads = self._views(self._flat_grad)
        if master_weights:
            self._flat_master = torch.empty(total, dtype=torch.float32, device=device)
            self.masters = self._views(self._flat_master)
            for name, param in self.params.items():
                self.masters[name].copy_(param.detach())
        else:
            self.masters = {name: param.detach() for name, param in self.params.items()}
        self._adam = self._build_adam()
        for name, param in self.params.items():
            param.register_post_accumulate_grad_hook(self._accumulate(self.grads[name]))

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: flat[self._offsets[name] : self._offsets[name] + param.numel()].view(param.shape)
            for name, param in self.params.items()
        }

    @staticmethod
    def _accumulate(row: torch.Tensor) -> Callable[[torch.Tensor], None]:
        def hook(param: torch.Tensor) -> None:
            assert param.grad is not None
            row.add_(param.grad.to(row.device))
            param.grad = None

        return hook

    def _build_adam(self) -> torch.optim.AdamW:
        c = self.config
        if self.has_masters:
            pieces = [(self._flat_master[: self._split], self._flat_grad[: self._split], c.weight_decay)]
            pieces.append((self._flat_master[self._split :], self._flat_grad[self._split :], 0.0))
            groups = []
            for values, grads, decay in pieces:
                if values.numel():
                    leaf = values.detach().requires_grad_()  # shares memory with the flat buffer
                    leaf.grad = grads
                    groups.append({"params": [leaf], "weight_decay": decay})
        else:
            by_decay = {True: [], False: []}  # type: dict[bool, list[nn.Parameter]]
            for param in self.params.values():
                by_decay[param.dim() >= 2].append(param)
            groups = [{"params": rows, "weight_decay": c.weight_decay if key else 0.0} for key, rows in by_decay.items() if rows]
        return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)

    def trained(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds as masters."""
        return dict(self.masters)

    def reference(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The policy of now, to be kept. Copies: in fp32 the masters have the weights' dtype, and a view would follow them."""
        return {name: row.detach().to(dtype, copy=True) for name, row in self.masters.items()}

    def reference_weight(self, name: str, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        """One of its weights."""
        return kept[name]

    def kept(self) -> Iterator[torch.Tensor]:
        """Masters, or the parameters that are trained themselves, and the moments; for parking.py."""
        yield from tensors_of_optimizer(self._adam)

    def zero_grad(self) -> None:
        self._flat_grad.zero_()

    @property
    def gradient(self) -> torch.Tensor:
        """All gradients, flat fp32, writable: to be reduced over ranks before `grad_norm`."""
        return self._flat_grad

    def grad_norm(self) -> float:
        """L2 norm over all gradients; NaN or infinite when one of them is."""
        return float(torch.linalg.vector_norm(self._flat_grad))

    def non_finite(self) -> list[str]:
        """Names of parameters whose gradient holds NaN or infinity."""
        return [name for name, grad in self.grads.items() if not bool(torch.isfinite(grad).all())]

    def step(self, lr: float, grad_norm: float) -> None:
        """One AdamW update at `lr` with gradients clipped to clip_grad_norm (0: not clipped), then gradients are zeroed.

        The model weights are not touched when there are masters.
        """
        if self.config.clip_grad_norm > 0 and grad_norm > self.config.clip_grad_norm:
            self._flat_grad.mul_(self.config.clip_grad_norm / (grad_norm + CLIP_EPSILON))
        if not self.has_masters:
            for name, param in self.params.items():
                param.grad = self.grads[name].to(device=param.device, dtype=param.dtype)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        if not self.has_masters:
            for param in self.params.values():
                param.grad = None
        self.zero_grad()

    def reset(self) -> None:
        """Forget the moments and the step count; masters stay."""
        self._adam = self._build_adam()
        self.zero_grad()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """`<moment>/<parameter name>` -> fp32 view, and `step` [groups] fp32; only `step` before the first update."""
        result = {"step": torch.tensor([float(s["step"]) if s else 0.0 for s in self._group_states()])}
        for moment in MOMENTS:
            for name, tensor in self._moment_views(moment).items():
                result[f"{moment}/{name}"] = tensor
        return result

    def prepare_to_load(self, stepped: bool) -> None:
        """Forget everything; with `stepped` moments of zero, so that `state_tensors` names all that a later save holds."""
        self.reset()
        for leaf in (leaf for group in self._adam.param_groups if stepped for leaf in group["params"]):
            step = torch.zeros((), dtype=torch.float32, device=leaf.device)
            self._adam.state[leaf] = {"step": step} | {moment: torch.zeros_like(leaf) for moment in MOMENTS}

    def load_state_tensors(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `state_tensors`; KeyError naming what is missing."""
        steps = state["step"]
        self.prepare_to_load(bool(steps.any()))
        if not bool(steps.any()):
            return
        for group, step in zip(self._adam.param_groups, steps, strict=True):
            for leaf in group["params"]:
                self._adam.state[leaf]["step"].copy_(step)
        for moment in MOMENTS:
            for name, view in self._moment_views(moment).items():
                view.copy_(state[f"{moment}/{name}"])

    def _group_states(self) -> list[dict[str, torch.Tensor]]:
        return [self._adam.state.get(group["params"][0], {}) for group in self._adam.param_groups]

    def _moment_views(self, moment: str) -> dict[str, torch.Tensor]:
        if not any(self._group_states()):
            return {}
        if not self.has_masters:
            return {name: self._adam.state[param][moment] for name, param in self.params.items()}
        views = {}
        rows = [state[moment] for state in self._group_states()]
        starts = [0, self._split] if len(rows) == 2 else [0 if self._split else self._split]
        for name, param in self.params.items():
            offset = self._offsets[name]
            row = 1 if len(rows) == 2 and offset >= self._split else 0
            local = offset - starts[row]
            views[name] = rows[row][local : local + param.numel()].view(param.shape)
        return views
