"""How a CPU multiplies bf16 matrices (precision.cpu_matmul) inside Megatron's ranks: both ways, forced."""

from __future__ import annotations

import pytest
import torch

from runner.config.schema import CpuMatmul
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, megatron

pytestmark = pytest.mark.megatron
WAYS = (CpuMatmul.native, CpuMatmul.widened)


def test_every_rank_takes_the_way_that_is_asked_for() -> None:
    """Each says so in its log after it took it; logprobs repeat bit for bit and are those of the other way but for rounding."""
    found: dict[CpuMatmul, torch.Tensor] = {}
    for way in WAYS:
        cfg = megatron_config("moe", "tp2_sp", format="int4", **{"precision.cpu_matmul": way})
        with megatron(cfg) as trainer:
            for rank in range(2):
                log = trainer.ranks.log(rank).read_text()
                assert f"bf16 matrices on this CPU: {way.name}, asked for" in log, log
            found[way], again = (torch.cat(trainer.logprobs(batch(cfg))) for _ in range(2))
            assert torch.equal(found[way], again)
    torch.testing.assert_close(found[CpuMatmul.native], found[CpuMatmul.widened], atol=0.1, rtol=0)


def test_ranks_take_what_their_parent_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CPU_MATMUL", "widened")
    with megatron(megatron_config("dense", "single", format="int4")) as trainer:
        assert "bf16 matrices on this CPU: widened, as the process that started this one" in trainer.ranks.log(0).read_text()
