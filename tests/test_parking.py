"""Trainers that sleep: their memory is empty meanwhile, and afterwards nothing is different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config.schema import QatPlacement
from runner.trainer.parking import Parking
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import MOE, batch, config


def test_views_and_shared_storages_come_back_and_gradients_are_zero() -> None:
    flat = torch.randn(12)
    view, grads, other = flat[3:9].view(2, 3), torch.ones(5), torch.arange(4, dtype=torch.int32)
    before = flat.clone(), other.clone()
    parking = Parking(torch.device("cpu"), lambda: [flat, view, other], lambda: [grads, view])
    assert parking.sleep() == (12 + 5 + 4) * 4 and parking.full and parking.sleep() == 0
    assert [tensor.untyped_storage().nbytes() for tensor in (flat, view, grads, other)] == [0, 0, 0, 0]
    parking.wake()
    parking.wake()
    assert torch.equal(flat, before[0]) and torch.equal(other, before[1]) and not grads.any() and not parking.full
    view.fill_(7.0)
    assert flat[3:9].eq(7).all()


def run(trainer: TorchTrainer, cfg: Any, sleeping: bool, folder: Path) -> list[Any]:
    """Everything that a run sees; with naps in between, before the first step and after loading too."""

    def nap() -> None:
        if sleeping:
            trainer.sleep()
            trainer.sleep()
            kept = [*trainer.model.parameters(), trainer.optimizer.gradient]
            assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == 0
            trainer.wake()

    seen: list[Any] = []
    for seed in range(3):
        nap()
        seen.append(trainer.step(batch(cfg, seed=seed)).metrics)
        nap()
        seen.append(torch.cat(trainer.logprobs(batch(cfg, seed=9))))
    nap()
    seen += [part for item in trainer.export() for part in item.parts.values()]
    trainer.save(folder)
    trainer.step(batch(cfg, seed=4))
    trainer.load(folder)
    nap()
    return [*seen, trainer.step(batch(cfg, seed=5)).metrics]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"format": "bf16", "algorithm.kl_coef": 0.1},
        {"trainer.master_weights": False, "precision.qat_placement": QatPlacement.forward, "precision.base_dtype": "float32"},
    ],
)
def test_a_trainer_that_slept_is_the_same_bit_for_bit(changes: dict[str, object], tmp_path: Path) -> None:
    found = []
    for sleeping in (False, True):
        cfg = config(MOE, **changes)
        folder = tmp_path / str(sleeping)
        folder.mkdir()
        found.append(run(TorchTrainer(cfg), cfg, sleeping, folder))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_memory_that_is_used_asleep_is_an_error() -> None:
    cfg = config(MOE)
    trainer = TorchTrainer(cfg)
    trainer.sleep()
    with pytest.raises(RuntimeError):
        trainer.step(batch(cfg))
