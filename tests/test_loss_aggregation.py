"""What a token's loss weighs: every aggregation against its formula, and the same gradients however a step is divided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from runner.algorithms.aggregation import loss_weights
from runner.config.schema import LossAggregation
from runner.data import Batch
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import batch, config

ALL = list(LossAggregation)


def _by_formula(aggregation: LossAggregation, losses: list[np.ndarray], longest: int) -> float:
    """The published formulas in numpy; `losses` holds the counted tokens of each sequence."""
    used = [row for row in losses if len(row)]
    return {
        "token_mean": lambda: np.concatenate(used).sum() / sum(len(row) for row in used),
        "sequence_mean": lambda: np.mean([row.sum() for row in used]),
        "sequence_mean_of_token_means": lambda: np.mean([row.mean() for row in used]),
        "constant_length": lambda: np.mean([row.sum() / longest for row in used]),
    }[aggregation.value]()


@pytest.mark.parametrize("aggregation", ALL)
def test_weights_are_those_of_the_formula(aggregation: LossAggregation) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        masks = [torch.from_numpy(random.random(length) > 0.3) for length in random.integers(1, 30, size=7)]
        masks[3][:] = False  # a sequence without a counted token does not count
        values = [torch.from_numpy(random.normal(size=len(mask))) for mask in masks]
        found = loss_weights(aggregation, masks, 64)
        total = sum(float((value * row).sum()) for value, row in zip(values, found.rows, strict=True)) / found.normalizer
        counted = [value[mask].numpy() for value, mask in zip(values, masks, strict=True)]
        assert total == pytest.approx(_by_formula(aggregation, counted, 64), rel=1e-5)
        assert all(bool((row[~mask] == 0).all()) for row, mask in zip(found.rows, masks, strict=True))
        assert found.tokens == sum(int(mask.sum()) for mask in masks)


@pytest.mark.parametrize(
    ("aggregation", "short"),
    [("token_mean", 0.0099), ("sequence_mean", 0.0099), ("sequence_mean_of_token_means", 0.5), ("constant_length", 0.0099)],
)
def test_the_share_of_a_short_and_a_long_sequence(aggregation: str, short: float) -> None:
    masks = [torch.ones(10, dtype=torch.bool), torch.ones(1000, dtype=torch.bool)]
    sums = [float(row.sum()) for row in loss_weights(LossAggregation(aggregation), masks, 1000).rows]
    assert sums[0] / sum(sums) == pytest.approx(short, rel=1e-3)


def test_nothing_counted_is_no_division_by_zero() -> None:
    for aggregation in ALL:
        found = loss_weights(aggregation, [torch.zeros(3, dtype=torch.bool)], 8)
        assert found.normalizer >= 1 and float(found.rows[0].sum()) == 0


def _trainer(aggregation: LossAggregation, tokens: int, **changes: object) -> TorchTrainer:
    """fp32, so that what is left is the order of additions; gradients are kept to look at."""
    cfg = config(
        **{
            "trainer.max_tokens_per_gpu": tokens,
            "precision.base_dtype": "float32",
            "algorithm.loss_aggregation": aggregation,
            "rollout.sampling.max_response_tokens": 16,
            **changes,
        }
    )
    trainer = TorchTrainer(cfg)
    trainer.optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]
    return trainer


def _gradient(trainer: TorchTrainer, data: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    metrics = trainer.step(data).metrics
    return trainer.optimizer._flat_grad.clone(), metrics


@pytest.mark.parametrize("aggregation", ALL)
@pytest.mark.parametrize("estimator", ["grpo", "gspo"])
def test_a_step_in_one_piece_and_in_many_has_the_same_gradient(aggregation: LossAggregation, estimator: str) -> None:
    changes: dict[str, Any] = {"algorithm.estimator": estimator, "algorithm.entropy_coef": 0.01}
    found = []
    for tokens in (16, 10_000):
        trainer = _trainer(aggregation, tokens, **changes)
        data = batch(trainer.cfg)
        data = replace(data, old_logprobs=[row + 0.1 for row in trainer.logprobs(data)])
        found.append(_gradient(trainer, data))
    assert found[0][0].norm() > 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    for name in ("train/loss", "train/pg_loss"):
        assert found[0][1][name] == pytest.approx(found[1][1][name], rel=1e-4)


@pytest.mark.parametrize("aggregation", ALL)
def test_a_step_has_the_gradient_of_the_formula(aggregation: LossAggregation) -> None:
    """REINFORCE on-policy: -A logp of every counted token, put together by the formula in plain torch."""
    trainer = _trainer(aggregation, 24, **{"algorithm.estimator": "cispo"})
    data = batch(trainer.cfg)
    ours, metrics = _gradient(trainer, data)
    trainer.optimizer.zero_grad()
    rows = []
    for sample, advantages in zip(data.samples, data.advantages, strict=True):
        logits = trainer.model(input_ids=sample.tokens.unsqueeze(0)).logits[0].float()
        logprobs = torch.log_softmax(logits, -1)[sample.prompt_length - 1 : -1].gather(1, sample.response_tokens.unsqueeze(1))
        rows.append((-advantages * logprobs.squeeze(1))[sample.loss_mask])
    sums, means = torch.stack([row.sum() for row in rows]), torch.stack([row.mean() for row in rows])
    loss = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": sums.mean(),
        "sequence_mean_of_token_means": means.mean(),
        "constant_length": sums.mean() / 16,
    }[aggregation.value]
    loss.backward()
    torch.testing.assert_close(ours, trainer.optimizer._flat_grad, rtol=1e-3, atol=1e-6)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_every_update_of_a_rollout_has_its_own_normalizer() -> None:
    """Two updates, lengths apart: each is divided by its own tokens and sequences, whatever the other one holds."""
    for aggregation in ALL:
        whole = _trainer(aggregation, 10_000, **{"algorithm.updates_per_rollout": 2})
        data = batch(whole.cfg)
        gradients: list[torch.Tensor] = []
        whole.optimizer.step = lambda lr, norm: gradients.append(whole.optimizer._flat_grad.clone())  # type: ignore[method-assign]  # noqa: B023
        whole.optimizer.zero_grad()
        whole.step(data)
        assert len(gradients) == 2
        single = _trainer(aggregation, 10_000)
        half, _ = _gradient(single, data.select([0, 1, 2, 3]))
        torch.testing.assert_close(gradients[0], half, rtol=1e-4, atol=1e-6)
