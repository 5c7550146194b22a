"""The estimators of the policy gradient: one file of this folder each, with its advantages and its loss per token.

`algorithm.estimator` is the name of a file, which ends in `ESTIMATOR = <an Estimator>`. Importing this package and its files
imports no torch, so that rules ask them: methods that compute import it.

Shape legend: N response tokens of a micro-batch laid end to end, S samples in it, G samples of one prompt.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from runner.config.schema import AlgorithmConfig

if TYPE_CHECKING:
    import torch

MAX_LOG_RATIO = 20.0  # nats
GROUP_EPSILON = 1e-6


@dataclass(frozen=True)
class Rows:
    """What a loss is computed from, all [N] fp32 and 0 outside the mask; `mask` bool, `sample_ids` int64 in [0, S)."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    sample_ids: torch.Tensor
    num_samples: int


@dataclass(frozen=True)
class TokenLoss:
    """`loss` [N]: per-token objective, to be weighted, masked and summed; `clipped` [N] bool: the clip took the gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor


class Estimator(ABC):
    """One estimator. Its advantages are GRPO's unless it says otherwise."""

    compares_group: ClassVar[bool] = True  # an advantage compares a sample with the others of its prompt
    dual_clip: ClassVar[bool] = False  # reads algorithm.dual_clip

    def advantages(
        self, algorithm: AlgorithmConfig, rewards: Sequence[torch.Tensor], counts: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """One advantage per sample, [G] fp32 of each group, from its rewards [G] fp32; `counts` [G]: tokens inside the masks."""
        return [group_normalized(row, by_std=algorithm.normalize_by_std) for row in rewards]

    @abstractmethod
    def loss(self, algorithm: AlgorithmConfig, rows: Rows) -> TokenLoss:
        """The loss of every token; one outside the mask weighs nothing."""


def inside(mask: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """`row` [N] with zeros outside the mask: infinities and NaN that stood there are left neither in value nor in gradient."""
    import torch

    return torch.where(mask, row, 0.0)


def group_normalized(rewards: torch.Tensor, *, by_std: bool) -> torch.Tensor:
    """GRPO: rewards [G] fp32 of one prompt -> advantages [G]. The unbiased std, as in the public implementations.

    A group of one sample, or of equal rewards, gives zeros.
    """
    import torch

    centred = rewards - rewards.mean()
    if not by_std:
        return centred
    if len(rewards) == 1 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    return centred / (rewards.std() + GROUP_EPSILON)


def names() -> tuple[str, ...]:
    """Every estimator, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def estimator_of(name: str) -> Estimator:
    """The estimator of this name; rules/numbers.py refuses one that no file has."""
    return cast(Estimator, importlib.import_module(f"{__name__}.{name}").ESTIMATOR)
