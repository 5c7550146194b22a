"""Mismatch metrics and the decomposition that adds up."""

from __future__ import annotations

import math

import pytest
import torch

from runner.data import WeightSpan
from runner.run import mismatch
from runner.trainer.protocol import StepResult
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import DENSE, batch, config


def test_metrics_by_hand() -> None:
    data = batch(config(), size=2)
    for sample in data.samples:
        sample.loss_mask[:] = False
        sample.loss_mask[1:3] = True
    old = [sample.rollout_logprobs.clone() for sample in data.samples]
    old[0][0] = 99.0  # outside the mask
    old[0][1] += 0.2
    old[1][2] -= 0.4
    data.samples[0].weight_spans = [WeightSpan(3, 0, 2), WeightSpan(2, 2, data.samples[0].response_length)]
    data.samples[1].weight_spans = [WeightSpan(1, 0, data.samples[1].response_length)]
    found = mismatch.metrics(data.samples, StepResult({}, old, old_version=3))
    assert found["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.15, abs=1e-5)
    assert found["train/train_rollout_kl_k1"] == pytest.approx(0.05, abs=1e-5)
    k3 = (math.exp(0.2) - 1 - 0.2 + math.exp(-0.4) - 1 + 0.4) / 4
    assert found["train/train_rollout_kl_k3"] == pytest.approx(k3, abs=1e-5)
    assert found["train/train_rollout_ppl_ratio"] == pytest.approx(math.exp(0.05), abs=1e-5)
    by_lag = [found[f"train/train_rollout_logprob_abs_diff/lag_{lag}"] for lag in (0, 1, 2)]
    assert by_lag == pytest.approx([0.2, 0.0, 0.2], abs=1e-5)
    assert found["train/weight_version_lag"] == pytest.approx((0 + 1 + 2 + 2) / 4)


def test_a_wild_difference_is_a_finite_metric() -> None:
    data = batch(config(), size=1)
    data.samples[0].loss_mask[:] = True
    old = [data.samples[0].rollout_logprobs + 500.0]
    found = mismatch.metrics(data.samples, StepResult({}, old, old_version=0))
    assert math.isfinite(found["train/train_rollout_kl_k3"]) and found["train/train_rollout_kl_k3"] > 1e6


def test_the_decomposition_adds_up_and_each_part_is_real() -> None:
    cfg = config(**{"router_replay.trainer": True})
    trainer, data = TorchTrainer(cfg), batch(cfg, routes=True)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    found = mismatch.decompose(trainer, data, 4)
    assert found["mismatch/residual"] < 1e-12
    parts = [found[f"mismatch/{name}"] for name in ("numerics", "routing", "quantization")]
    assert sum(parts) == pytest.approx(found["mismatch/total"], abs=1e-9)
    assert all(found[f"mismatch/{name}_abs"] > 0 for name in ("numerics", "routing", "quantization"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_parts_vanish_where_their_cause_is_absent() -> None:
    """An engine that is the trainer: no numerics. A dense bf16 model: no routing and no quantization."""
    trainer = TorchTrainer(cfg := config())
    data = batch(cfg)
    for sample, row in zip(data.samples, trainer.logprobs(data, routes="own"), strict=True):
        sample.rollout_logprobs = row
    found = mismatch.decompose(trainer, data, len(data))
    assert found["mismatch/numerics_abs"] == 0 and found["mismatch/quantization_abs"] > 0
    dense = TorchTrainer(cfg := config(DENSE, format="bf16"))
    found = mismatch.decompose(dense, batch(cfg), 4)
    assert found["mismatch/routing_abs"] == 0 and found["mismatch/quantization_abs"] == 0
    assert found["mismatch/numerics_abs"] > 0
