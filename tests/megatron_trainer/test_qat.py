"""In-place quantization, router replay and what else is decided inside a rank; and that in place equals in the forward."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from runner.config.schema import QatPlacement, Role
from runner.trainer.megatron import arguments
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.one_rank import CASES
from tests.megatron_trainer.scenario import Result, megatron, run

pytestmark = pytest.mark.megatron

ROOT = Path(__file__).parents[2]


@cache
def _one_rank() -> dict[str, str]:
    """Case -> what the program printed about it."""
    environment = os.environ | arguments.environment(megatron_config())
    command = [sys.executable, "-W", "ignore", "-m", "tests.megatron_trainer.one_rank"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {name: text.replace("\\n", "\n") for name, _, text in lines} | {"stderr": done.stderr[-2000:]}


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_inside_one_rank(case: str) -> None:
    printed = _one_rank()
    assert printed.get(case) == "passed", printed.get(case, printed["stderr"])


def _run(layout: str, placement: QatPlacement, **changes: object) -> Result:
    cfg = megatron_config(
        "moe",
        layout,
        format="int4",
        **{
            "precision.qat_placement": placement,
            "precision.roles": [Role.routed_expert, Role.attention],
            "router_replay.trainer": True,
        },
        **changes,
    )
    with megatron(cfg) as trainer:
        return run(trainer, cfg, steps=3)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("dp2", {"trainer.grad_bucket_elements": 3000, "trainer.recompute": "full", "trainer.max_tokens_per_gpu": 40}),
        ("dp2", {"trainer.distributed_optimizer": False, "trainer.overlap_param_gather": False}),
        ("tp2_sp", {"trainer.overlap_param_gather": False, "trainer.overlap_grad_reduce": False}),
    ],
    ids=["distributed-overlapped-recomputed", "whole-optimizer", "tensor-parallel"],
)
def test_in_place_equals_fake_quantization_in_the_forward(layout: str, changes: dict[str, object]) -> None:
    """Bit for bit: losses, gradient norms and masters, over three updates."""
    in_place = _run(layout, QatPlacement.in_place, **changes)
    forward = _run(layout, QatPlacement.forward, **changes)
    assert torch.equal(in_place.logprobs, forward.logprobs)
    assert in_place.metrics == forward.metrics
    assert all(torch.equal(tensor, forward.weights[name]) for name, tensor in in_place.weights.items())
