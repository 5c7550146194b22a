"""Megatron ranks that sleep between everything they do: nothing is different afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.config.schema import Config
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, exported, megatron

pytestmark = pytest.mark.megatron


def _run(cfg: Config, folder: Path, *, sleeping: bool) -> tuple[list[object], dict[str, torch.Tensor]]:
    """Metrics and logprobs of three steps with a save and a load, and the export."""
    folder.mkdir()
    with megatron(cfg) as trainer:

        def nap() -> None:
            if sleeping:
                assert min(trainer.ranks.call("sleep")) > 100_000  # bytes of every rank
                trainer.sleep()
                trainer.wake()
                trainer.wake()

        seen: list[object] = []
        for seed in range(3):
            nap()
            seen.append(trainer.step(batch(cfg, seed=seed)).metrics)
            nap()
            seen.append(torch.cat(trainer.logprobs(batch(cfg, seed=9))).tolist())
            if seed == 1:
                nap()
                trainer.save(folder)
        nap()
        weights = exported(trainer, "rollout")
        trainer.load(folder)
        nap()
        return [*seen, trainer.step(batch(cfg, seed=7)).metrics], weights


@pytest.mark.parametrize(("layout", "format"), [("tp2_sp", "int4"), ("dp2", "int4"), ("dp2", "bf16")])
def test_ranks_that_slept_are_the_same_bit_for_bit(layout: str, format: str, tmp_path: Path) -> None:
    cfg = megatron_config("moe", layout, format=format, **{"router_replay.trainer": True, "trainer.distributed_optimizer": True})
    (plain, weights), (slept, others) = (_run(cfg, tmp_path / str(nap), sleeping=nap) for nap in (False, True))
    assert plain == slept
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
