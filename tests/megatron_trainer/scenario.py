"""What the layout tests run and compare: logprobs, two updates with replayed routes, exported weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from runner.config.schema import Config
from runner.data import Batch
from runner.models.vocabulary import PAD_ID
from runner.trainer.megatron import MegatronTrainer
from tests.trainer_configs import batch as random_batch


@dataclass
class Result:
    logprobs: torch.Tensor  # before the updates, all samples
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]  # bf16 export after the updates
    packed: dict[str, torch.Tensor]  # rollout export after the updates


def batch(cfg: Config, seed: int = 0, size: int = 8) -> Batch:
    """Random samples, with routes where they are replayed; one of them holds the padding token."""
    made = random_batch(cfg, size=size, seed=seed, routes=cfg.router_replay.trainer and bool(cfg.model.num_experts))
    made.samples[0].tokens[2] = PAD_ID
    return made


@contextmanager
def megatron(cfg: Config) -> Iterator[MegatronTrainer]:
    trainer = MegatronTrainer(cfg)
    try:
        yield trainer
    finally:
        trainer.close()


def exported(trainer: Any, format: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for tensor in trainer.export(format):
        assert not found.keys() & tensor.parts.keys(), f"{tensor.name} came twice"
        found |= {name: part.clone() for name, part in tensor.parts.items()}
    return found


def run(trainer: Any, cfg: Config, steps: int = 2, given: Callable[[Batch], Batch] = lambda batch: batch) -> Result:
    """`given`: what the trainer gets in place of a batch."""
    logprobs = torch.cat(trainer.logprobs(given(batch(cfg))))
    metrics = [trainer.step(given(batch(cfg, seed=seed))).metrics for seed in range(steps)]
    return Result(logprobs, metrics, exported(trainer, "bf16"), exported(trainer, "rollout"))


def assert_close(ours: Result, theirs: Result, *, logprob: float, relative: float, weight: float) -> None:
    """Tolerances: absolute for logprobs and weights, relative for gradient norms, entropies and losses (of 0.01 and more)."""
    assert (ours.logprobs - theirs.logprobs).abs().max() <= logprob
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine.keys() == other.keys()
        for name in ("train/loss", "train/entropy_loss", "train/grad_norm"):
            assert abs(mine[name] - other[name]) <= relative * max(abs(other[name]), 1e-2), name
    assert ours.weights.keys() == theirs.weights.keys()
    for name, tensor in ours.weights.items():
        assert tensor.shape == theirs.weights[name].shape, name
        assert (tensor.float() - theirs.weights[name].float()).abs().max() <= weight, name
