"""What the loss mask leaves out has no say: not in values, not in gradients, whatever stands there.

Every estimator, correction, KL estimator and aggregation; infinities, NaN and huge logprobs in the masked places.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.algorithms import aggregation, correction, estimators, losses
from runner.config.schema import Correction, LossAggregation
from runner.trainer.policy_step import Sums, TokenRows, micro_batch_loss
from tests.trainer_configs import config

WILD = (math.inf, -math.inf, math.nan, 100.0, -100.0, 1e30, -1e30, 0.0)
ROWS = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "advantages", "entropy")
TOKENS, SAMPLES = 12, 3


def _rows(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Six rows [N] of ordinary numbers, sample ids [N], and a mask [N] with both values in it."""
    generator = torch.Generator().manual_seed(seed)
    base = -3 * torch.rand(TOKENS, generator=generator)
    rows = {name: base + 0.3 * torch.randn(TOKENS, generator=generator) for name in ROWS}
    rows["advantages"] = torch.randn(TOKENS, generator=generator)
    mask = torch.rand(TOKENS, generator=generator) > 0.4
    mask[0], mask[1] = True, False
    return rows, torch.arange(TOKENS) * SAMPLES // TOKENS, mask


def _step(
    rows: dict[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor, on_policy: bool, **changes: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, float]]:
    """(loss, its gradients with respect to logprobs and entropy, the metrics)."""
    cfg = config(**{f"algorithm.{key}": value for key, value in changes.items()})
    masks = [mask[ids == sample] for sample in range(SAMPLES)]
    weights = aggregation.loss_weights(cfg.algorithm.loss_aggregation, masks, 16)
    logprobs, entropy = rows["logprobs"].clone().requires_grad_(), rows["entropy"].clone().requires_grad_()
    token_rows = TokenRows(
        advantages=rows["advantages"],
        mask=mask,
        weights=torch.cat(weights.rows),
        rollout_logprobs=rows["rollout_logprobs"],
        sample_ids=ids,
        num_samples=SAMPLES,
        old_logprobs=None if on_policy else rows["old_logprobs"],
        ref_logprobs=rows["ref_logprobs"],
    )
    sums = Sums()
    loss = micro_batch_loss(cfg.algorithm, logprobs, entropy, token_rows, weights, sums)
    loss.backward()
    assert logprobs.grad is not None and entropy.grad is not None
    return loss.detach(), logprobs.grad, entropy.grad, sums.means()


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("kind", list(Correction))
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    places=st.lists(st.tuples(st.sampled_from(ROWS), st.integers(0, TOKENS - 1), st.sampled_from(WILD)), min_size=1, max_size=40),
    kl=st.sampled_from(("k1", "k2", "k3")),
    weighting=st.sampled_from(list(LossAggregation)),
    dual_clip=st.sampled_from((0.0, 3.0)),
    on_policy=st.booleans(),
)
def test_masked_places_change_no_value_and_no_gradient(
    estimator: str,
    kind: Correction,
    seed: int,
    places: list[tuple[str, int, float]],
    kl: str,
    weighting: LossAggregation,
    dual_clip: float,
    on_policy: bool,
) -> None:
    rows, ids, mask = _rows(seed)
    changes = {
        "estimator": estimator, "correction": kind, "correction_low": 0.5, "kl_coef": 0.1, "kl_estimator": kl,
        "dual_clip": dual_clip, "entropy_coef": 0.01, "loss_aggregation": weighting,
    }  # fmt: skip
    plain = _step(rows, ids, mask, on_policy, **changes)
    dirty = {name: row.clone() for name, row in rows.items()}
    for name, place, value in [*places, *((name, 1, math.nan) for name in ROWS)]:  # place 1 is always masked
        if not mask[place]:
            dirty[name][place] = value
    found = _step(dirty, ids, mask, on_policy, **changes)
    assert torch.equal(found[0], plain[0]) and torch.isfinite(plain[0])
    for gradient, expected in zip(found[1:3], plain[1:3], strict=True):
        assert torch.equal(gradient, expected) and bool((gradient[~mask] == 0).all())
    assert found[3] == plain[3]


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("gap", [100.0, 1e3, math.inf])
def test_a_masked_token_of_a_huge_log_ratio_leaves_the_policy_loss_alone(estimator: str, gap: float) -> None:
    cfg = config(**{"algorithm.estimator": estimator})
    mask, ids = torch.tensor([True, False]), torch.tensor([0, 0])
    logprobs = torch.tensor([-1.0, -1.0]).requires_grad_()
    old = torch.tensor([-1.1, -1.0 - gap])
    result = losses.policy_loss(cfg.algorithm, logprobs, old, torch.ones(2), mask, ids, 1)
    result.loss.sum().backward()
    assert torch.isfinite(result.loss).all() and logprobs.grad is not None
    assert torch.isfinite(logprobs.grad).all() and logprobs.grad[1] == 0 and logprobs.grad[0] != 0


@pytest.mark.parametrize("kind", list(Correction))
@pytest.mark.parametrize("value", WILD)
def test_a_masked_token_has_no_part_in_a_correction(kind: Correction, value: float) -> None:
    cfg = config(**{"algorithm.correction": kind, "algorithm.correction_low": 0.5})
    mask, ids = torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
    old, rollout = torch.tensor([-1.0, value, -2.0]), torch.tensor([-1.2, -3.0, -1.9])
    found = correction.correction_weights(cfg.algorithm, old, rollout, mask, ids, 2)
    plain = correction.correction_weights(cfg.algorithm, torch.where(mask, old, -3.0), rollout, mask, ids, 2)
    assert torch.equal(found.weights[mask], plain.weights[mask]) and torch.isfinite(found.weights).all()
    assert not found.changed[1] or kind is Correction.mis
