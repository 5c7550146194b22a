"""Trainer and engines that share GPUs take turns: whoever is asked next has the memory, the other one sleeps.

Both are wrapped, so that the loop, the warm start, evaluations and checkpoints need not know. In a weight sync the trainer hands
over in the middle: it is awake while its export is written to the host, and asleep when the engines begin to load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch

from runner.images import PromptImage
from runner.rollout.protocol import RolloutPool, SyncReport
from runner.samples import Batch, ExportedTensor, Request, Sample, WeightStream
from runner.trainer.protocol import Routes, Saving, StepResult, Trainer, Weights


class Turns:
    """`trainer` and `pool` behave as those that are given, which must not be used beside them any more."""

    def __init__(self, trainer: Trainer, pool: Any) -> None:
        """`pool` has `sleep` and `wake` beside the protocol, and is awake; so is the trainer, unless it sleeps already."""
        self._trainer, self._pool = trainer, pool
        self._awake: Literal["trainer", "pool"] = "pool"
        trainer.sleep()
        self.trainer = cast(Trainer, _TrainerInTurns(trainer, self))
        self.pool = cast(RolloutPool, _PoolInTurns(pool, self))

    def replace_trainer(self, trainer: Trainer) -> Trainer:
        """In place of one that was lost; awake, so the engines must sleep before it is built (`make_room`)."""
        self._trainer, self._awake = trainer, "trainer"
        self.trainer = cast(Trainer, _TrainerInTurns(trainer, self))
        return self.trainer

    def make_room(self) -> None:
        self._pool.sleep()

    def to_trainer(self) -> Trainer:
        if self._awake != "trainer":
            self._pool.sleep()
            self._trainer.wake()
            self._awake = "trainer"
        return self._trainer

    def to_pool(self) -> Any:
        if self._awake != "pool":
            self._trainer.sleep()
            self._pool.wake()
            self._awake = "pool"
        return self._pool

    def handing_over(self, stream: WeightStream) -> WeightStream:
        """The stream, at whose end the trainer sleeps; loading it wakes the engines."""
        yield from stream
        self._trainer.sleep()
        self._awake = "pool"


class _TrainerInTurns:
    def __init__(self, trainer: Trainer, turns: Turns) -> None:
        self._trainer, self._turns = trainer, turns

    @property
    def version(self) -> int:
        return self._trainer.version

    @version.setter
    def version(self, version: int) -> None:
        self._trainer.version = version

    def logprobs(self, batch: Batch, *, weights: Weights = "quantized", routes: Routes = "replayed") -> list[torch.Tensor]:
        return self._turns.to_trainer().logprobs(batch, weights=weights, routes=routes)

    def reference_logprobs(self, batch: Batch) -> list[torch.Tensor]:
        return self._turns.to_trainer().reference_logprobs(batch)

    def step(self, batch: Batch) -> StepResult:
        return self._turns.to_trainer().step(batch)

    def sft_step(
        self, samples: list[tuple[torch.Tensor, int]], lr: float, images: list[PromptImage | None] | None = None
    ) -> dict[str, float]:
        return self._turns.to_trainer().sft_step(samples, lr, images)

    def reset_optimizer(self) -> None:
        self._turns.to_trainer().reset_optimizer()

    def export(self, format: Literal["rollout", "bf16"] = "rollout") -> Iterator[ExportedTensor]:
        yield from self._turns.to_trainer().export(format)

    def save(self, folder: Path) -> None:
        self._turns.to_trainer().save(folder)

    def begin_save(self, folder: Path) -> Saving:
        return self._turns.to_trainer().begin_save(folder)

    def load(self, folder: Path) -> None:
        self._turns.to_trainer().load(folder)

    def __getattr__(self, name: str) -> Any:  # what needs no weights
        return getattr(self._trainer, name)


class _PoolInTurns:
    def __init__(self, pool: Any, turns: Turns) -> None:
        self._pool, self._turns = pool, turns

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        generated: Iterator[Sample] = self._turns.to_pool().generate(requests)
        return generated

    def score(self, sequences: list[torch.Tensor], images: list[PromptImage | None] | None = None) -> list[torch.Tensor]:
        scored: list[torch.Tensor] = self._turns.to_pool().score(sequences, images)
        return scored

    def update_weights(self, version: int, stream: WeightStream) -> SyncReport:
        report: SyncReport = self._pool.update_weights(version, self._turns.handing_over(stream))
        return report

    def __getattr__(self, name: str) -> Any:  # counters, state, description
        return getattr(self._pool, name)
