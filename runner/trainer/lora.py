"""Low-rank adapters in the place of masters: what the optimizer owns are A and B of each target, fp32 (see adapters.py).

The model's modules stay what they are. Its weights hold bf16(W + alpha / rank * B A), quantized where the plan says so, written
once per optimizer step as those of a full run are; and the gradient G of such a weight gives those of the adapters by the chain
rule, in fp32, as soon as autograd has it: dA = alpha / rank * B^T G, dB = alpha / rank * G A^T. G is freed at once.

So training, engine and export compute with one merged weight on one grid, and what quantization-aware training sees is exactly
what will be served. Were the base quantized alone and B A added in bf16, merging for an engine would round once more, to
weights that nobody trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from runner.config.schema import LoraConfig, OptimizerConfig
from runner.trainer.optimizer import MasterOptimizer

A, B = "lora_A", "lora_B"
Adapters = dict[str, torch.Tensor]  # `<weight>.lora_A` [.., rank, in] and `<weight>.lora_B` [.., out, rank], fp32


class AdapterOptimizer:
    """What the torch trainer needs of `MasterOptimizer`, for a model whose weights are frozen but for adapters.

    `masters` gives the merged weight of a target, fp32 [.., out, in], computed anew at each look; any other weight as it came.
    """

    has_masters = True

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        targets: Collection[str],
        rewritten: Collection[str],
        config: OptimizerConfig,
        lora: LoraConfig,
        seed: int,
    ) -> None:
        """`targets`: names of weights with adapters; `rewritten`: those that hold something else than they came with, too,
        since they are quantized. A is uniform in +-1 / sqrt(in) (Kaiming, as in PEFT) and depends on the seed; B is 0."""
        self.params = dict(named)
        self.targets = [name for name in self.params if name in targets]
        self._scale = lora.alpha / lora.rank
        self._base = {name: self.params[name].detach().clone() for name in {*self.targets, *rewritten} if name in self.params}
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, nn.Parameter] = {}
        for name, param in self.params.items():
            param.requires_grad_(name in self.targets)
            if name in self.targets:
                *stack, rows, columns = param.shape
                uniform = torch.rand(*stack, lora.rank, columns, generator=generator) * 2 - 1
                made[f"{name}.{A}"] = nn.Parameter((uniform * columns**-0.5).to(param.device))
                made[f"{name}.{B}"] = nn.Parameter(torch.zeros(*stack, rows, lora.rank, device=param.device))
                param.register_post_accumulate_grad_hook(self._chain(name))
        self._inner = MasterOptimizer(made.items(), config, master_weights=True)
        self._inner.params = {name: nn.Parameter(self.adapters[name], requires_grad=False) for name in made}  # not held twice
        self.masters: Mapping[str, torch.Tensor] = _Merged(self)
        self.step, self.reset, self.zero_grad = self._inner.step, self._inner.reset, self._inner.zero_grad
        self.grad_norm, self.non_finite = self._inner.grad_norm, self._inner.non_finite
        self.state_tensors, self.load_state_tensors = self._inner.state_tensors, self._inner.load_state_tensors

    @property
    def adapters(self) -> Adapters:
        return self._inner.masters

    @property
    def gradient(self) -> torch.Tensor:
        return self._inner.gradient

    @torch.no_grad()
    def merged(self, name: str, adapters: Adapters | None = None) -> torch.Tensor:
        """W + alpha / rank * B A, fp32; bits of W stay where the sum adds 0. Of a weight without adapter what it came with."""
        base = self._base[name] if name in self._base else self.params[name].detach()
        if name not in self.targets:
            return base
        a, b = self._pair(adapters or self.adapters, name, base.device)
        whole, delta = base.float(), torch.matmul(b, a).mul_(self._scale)
        return torch.where(delta == 0, whole, whole + delta)  # -0 + 0 would be 0

    def trained(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds as masters."""
        return dict(self.adapters)

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, weight as it came) of the whole model."""
        for name, param in self.params.items():
            yield name, self._base[name] if name in self._base else param.detach()

    def reference(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The policy of now, to be kept: the adapters alone."""
        return {name: row.detach().clone() for name, row in self.adapters.items()}

    def reference_weight(self, name: str, kept: dict[str, torch.Tensor]) -> torch.Tensor:
        """One of its weights."""
        return self.merged(name, kept)

    def kept(self) -> Iterator[torch.Tensor]:
        """For parking.py."""
        yield from self._inner.kept()
        yield from self._base.values()

    def _chain(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(param: torch.Tensor) -> None:
            assert param.grad is not None
            gradient = param.grad.float()
            param.grad = None
            a, b = self._pair(self.adapters, name, gradient.device)
            for kind, row in ((A, torch.matmul(b.mT, gradient)), (B, torch.matmul(gradient, a.mT))):
                total = self._inner.grads[f"{name}.{kind}"]
                total.add_(row.mul_(self._scale).to(total.device))

        return hook

    @staticmethod
    def _pair(adapters: Adapters, name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return adapters[f"{name}.{A}"].to(device), adapters[f"{name}.{B}"].to(device)


class _Merged(Mapping[str, torch.Tensor]):
    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._optimizer = optimizer

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._optimizer.merged(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizer.params)

    def __len__(self) -> int:
        return len(self._optimizer.params)
