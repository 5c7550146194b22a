"""Advantages, losses, KL estimators and corrections against numbers worked out by hand and against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from runner.algorithms import correction, estimators, losses
from runner.algorithms.advantages import compute_advantages
from runner.algorithms.estimators import TokenLoss, group_normalized
from runner.algorithms.estimators.reinforce_pp import token_whitened
from runner.config.choices import KlEstimator
from runner.config.compose import load_config
from runner.config.schema import Correction
from runner.errors import UserError
from tests.trainer_configs import batch, config

tensor = torch.tensor


def loss_of(
    estimator: str,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    samples: int = 1,
    **changes: object,
) -> TokenLoss:
    """The loss at the clip 0.2 and 0.28 of tokens whose old logprobs are 0; all of one sample and counted, unless said."""
    cfg = config(**{"algorithm.estimator": estimator, "algorithm.clip_low": 0.2, "algorithm.clip_high": 0.28, **changes})
    mask = torch.ones(len(logprobs), dtype=torch.bool) if mask is None else mask
    ids = torch.zeros(len(logprobs), dtype=torch.int64) if ids is None else ids
    return losses.policy_loss(cfg.algorithm, logprobs, torch.zeros_like(logprobs), advantages, mask, ids, samples)


def test_grpo_advantages_by_hand() -> None:
    rewards = tensor([1.0, 0.0, 0.0, 1.0])
    std = math.sqrt(4 * 0.25 / 3)
    expected = [0.5 / (std + 1e-6) * sign for sign in (1, -1, -1, 1)]
    assert group_normalized(rewards, by_std=True).tolist() == pytest.approx(expected, rel=1e-6)
    assert group_normalized(rewards, by_std=False).tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [3.0]])
def test_a_group_without_contrast_has_no_advantage(rewards: list[float]) -> None:
    assert group_normalized(tensor(rewards), by_std=True).abs().max() == 0


def test_reinforce_pp_whitens_over_the_tokens_of_the_batch() -> None:
    """Wrong answers four times longer: over samples the advantages would be 1 and -1, over tokens they are 2 and -.5."""
    rewards, counts = [tensor([1.0, 0.0]), tensor([0.0, 1.0])], [tensor([100, 400]), tensor([400, 100])]
    first, second = token_whitened(rewards, counts, by_std=True)
    assert first.tolist() == pytest.approx([2.0, -0.5], rel=2e-3) and second.tolist() == pytest.approx([-0.5, 2.0], rel=2e-3)
    tokens = torch.cat([torch.full((int(n),), float(a)) for a, n in zip([*first, *second], torch.cat(counts), strict=True)])
    assert tokens.mean() == pytest.approx(0, abs=1e-6) and tokens.std() == pytest.approx(1, abs=1e-5)
    assert token_whitened(rewards, counts, by_std=False)[0].tolist() == pytest.approx([0.8, -0.2])


@pytest.mark.parametrize(("rewards", "counts"), [([0.1, 0.1, 0.1], [3, 5, 7]), ([1.0, 0.0], [4, 0]), ([1.0, 0.0], [0, 0])])
def test_reinforce_pp_without_contrast_has_no_advantage(rewards: list[float], counts: list[int]) -> None:
    assert token_whitened([tensor(rewards)], [tensor(counts)], by_std=True)[0].abs().max() == 0


def test_reinforce_pp_counts_the_tokens_inside_the_loss_masks() -> None:
    cfg = config(**{"algorithm.estimator": "reinforce_pp"})
    samples = batch(cfg).samples
    rows = compute_advantages(cfg.algorithm, [samples[:4], samples[4:]])
    counted = torch.cat([row[sample.loss_mask] for row, sample in zip(rows, samples, strict=True)])
    assert counted.mean() == pytest.approx(0, abs=1e-6) and counted.std() == pytest.approx(1, abs=1e-5)
    assert abs(float(torch.cat(rows).mean())) > 1e-3  # the masked tokens would shift it


def test_advantages_follow_samples_and_need_rewards() -> None:
    cfg = config()
    samples = batch(cfg).samples
    rows = compute_advantages(cfg.algorithm, [samples[:4], samples[4:]])
    assert [len(row) for row in rows] == [sample.response_length for sample in samples]
    assert all(bool((row == row[0]).all()) for row in rows)
    samples[5].reward = float("nan")
    with pytest.raises(UserError, match="reward nan"):
        compute_advantages(cfg.algorithm, [samples[:4], samples[4:]])


def test_ppo_clip_by_hand() -> None:
    ratios = tensor([1.5, 0.5, 1.5, 0.5])
    logprobs = ratios.log().requires_grad_()
    result = loss_of("grpo", logprobs, tensor([1.0, 1.0, -1.0, -1.0]))
    # A > 0: gains end at 1.28; A < 0: gains end at 0.8; the other two sides are not clipped
    assert result.loss.tolist() == pytest.approx([-1.28, -0.5, 1.5, 0.8])
    assert result.clipped.tolist() == [True, False, False, True]
    result.loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_dual_clip_bounds_the_loss_of_negative_advantages_only() -> None:
    ratios = tensor([5.0, 5.0, 2.0, 0.5])
    logprobs = ratios.log().requires_grad_()
    result = loss_of("grpo", logprobs, tensor([-1.0, 1.0, -1.0, -1.0]), **{"algorithm.dual_clip": 3.0})
    assert result.loss.tolist() == pytest.approx([3.0, -1.28, 2.0, 0.8])
    assert result.clipped.tolist() == [True, True, False, True]
    result.loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.0, 2.0, 0.0])


def test_gspo_uses_the_geometric_mean_ratio_of_the_sequence() -> None:
    logprobs = tensor([0.2, -0.1, 0.4, 9.0]).requires_grad_()
    mask = tensor([True, True, True, False])
    ids = tensor([0, 0, 1, 1])
    advantages = tensor([1.0, 1.0, -2.0, -2.0])
    result = loss_of("gspo", logprobs, advantages, mask, ids, 2)
    first, second = math.exp(0.05), math.exp(0.4)  # the masked token takes no part
    assert result.loss[:3].tolist() == pytest.approx([-first, -first, 2 * second])
    result.loss[:3].sum().backward()
    # GSPO: d/dlogp_t of sum over tokens of -A s equals -A s per token (|o| tokens, each 1/|o|)
    assert logprobs.grad[:3].tolist() == pytest.approx([-first, -first, 2 * second])


def test_gspo_clips_whole_sequences() -> None:
    logprobs = tensor([0.5, 0.5]).requires_grad_()
    result = loss_of("gspo", logprobs, torch.ones(2))
    assert result.clipped.all() and result.loss.tolist() == pytest.approx([-1.28, -1.28])
    result.loss.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_cispo_keeps_every_gradient() -> None:
    logprobs = tensor([1.0, -3.0, 0.1]).requires_grad_()
    result = loss_of("cispo", logprobs, tensor([1.0, 1.0, -1.0]))
    result.loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.28, -0.8, math.exp(0.1)])
    assert result.clipped.tolist() == [True, True, False]


def test_on_policy_losses_agree_in_gradient() -> None:
    """At ratio 1 all three are the plain policy gradient -A."""
    cfg = config()
    advantages = tensor([0.3, -0.7, 2.0])
    for estimator in estimators.names():
        cfg.algorithm.estimator = estimator
        logprobs = tensor([-1.0, -0.2, -3.0]).requires_grad_()
        mask, ids = torch.ones(3, dtype=torch.bool), tensor([0, 0, 1])
        losses.policy_loss(cfg.algorithm, logprobs, logprobs.detach(), advantages, mask, ids, 2).loss.sum().backward()
        assert logprobs.grad.tolist() == pytest.approx((-advantages).tolist()), estimator


def test_kl_estimators_by_hand() -> None:
    logprobs, reference = tensor([-1.0]), tensor([-1.5])
    assert losses.kl_estimate(KlEstimator.k1, logprobs, reference).item() == pytest.approx(0.5)
    assert losses.kl_estimate(KlEstimator.k2, logprobs, reference).item() == pytest.approx(0.125)
    assert losses.kl_estimate(KlEstimator.k3, logprobs, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_kl_estimators_are_right_in_expectation() -> None:
    """Exact expectations over a small vocabulary: k1 and k3 are unbiased, k2's gradient is the KL's."""
    policy = tensor([0.1, -0.4, 0.7], dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(tensor([0.3, 0.2, -0.5], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(policy, 0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    for name in (KlEstimator.k1, KlEstimator.k3):
        estimate = (logprobs.exp() * losses.kl_estimate(name, logprobs, reference)).sum()
        assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
    (expected,) = torch.autograd.grad(exact, policy, retain_graph=True)
    (found,) = torch.autograd.grad(
        (logprobs.exp().detach() * losses.kl_estimate(KlEstimator.k2, logprobs, reference)).sum(), policy
    )
    torch.testing.assert_close(found, expected)


def test_entropy_by_definition_and_its_gradient() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.distributions.Categorical(logits=logits.detach()).entropy()
    torch.testing.assert_close(losses.entropy(logits), expected)
    assert torch.autograd.gradcheck(losses.entropy, (logits,))


def test_tis_icepop_and_mis_by_hand() -> None:
    ratio = tensor([0.25, 1.0, 1.5, 4.0])
    tis = correction.tis(ratio.log(), 2.0)
    assert tis.weights.tolist() == pytest.approx([0.25, 1.0, 1.5, 2.0]) and tis.changed.tolist() == [False, False, False, True]
    icepop = correction.icepop(ratio.log(), 0.5, 2.0)
    assert icepop.weights.tolist() == pytest.approx([0.0, 1.0, 1.5, 0.0])
    ids, mask = tensor([0, 0, 1, 1]), tensor([True, True, True, True])
    mis = correction.mis(ratio.log(), mask, ids, 2, 2.0)
    assert mis.weights.tolist() == pytest.approx([0.25, 0.25, 0.0, 0.0])
    two_sided = correction.mis(tensor([0.25, 1.0, 1.5, 1.0]).log(), mask, ids, 2, 2.0, 0.5)
    assert two_sided.weights.tolist() == pytest.approx([0.0, 0.0, 1.5, 1.5])
    assert two_sided.changed.tolist() == [True, True, False, False]
    masked = correction.mis(ratio.log(), tensor([True, True, True, False]), ids, 2, 2.0)
    assert masked.weights.tolist() == pytest.approx([0.25, 0.25, 1.5, 1.5])


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("tis", 0.0, 2.0), ("mis", 0.0, 2.0), ("icepop", 0.5, 5.0), ("none", 1.0, 1.0)]
)
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "cispo", "reinforce_pp"])
def test_every_correction_has_its_published_bounds(algorithm: str, kind: str, low: float, high: float) -> None:
    chosen = load_config([f"algorithm={algorithm}", f"algorithm.correction={kind}"]).algorithm
    assert (chosen.correction, chosen.correction_low, chosen.correction_high) == (Correction(kind), low, high)


def test_given_bounds_beat_those_of_the_correction() -> None:
    chosen = load_config(["algorithm.correction=mis", "algorithm.correction_low=0.5"]).algorithm
    assert (chosen.correction_low, chosen.correction_high) == (0.5, 2.0)


def test_every_algorithm_has_its_published_aggregation_and_clip() -> None:
    found = {}
    for name in ("grpo", "gspo", "cispo", "reinforce_pp"):
        chosen = load_config([f"algorithm={name}"]).algorithm
        found[name] = (chosen.loss_aggregation.value, chosen.clip_low, chosen.clip_high, chosen.dual_clip)
    assert found == {
        "grpo": ("token_mean", 0.2, 0.28, 0.0),
        "gspo": ("sequence_mean_of_token_means", 3e-4, 4e-4, 0.0),
        "cispo": ("token_mean", 1.0, 4.0, 0.0),
        "reinforce_pp": ("token_mean", 0.2, 0.28, 0.0),
    }


@pytest.mark.parametrize("kind", list(Correction))
def test_corrections_are_constants_and_one_without_mismatch(kind: Correction) -> None:
    cfg = config(**{"algorithm.correction": kind})
    old = tensor([-1.0, -2.0, -0.5]).requires_grad_()
    mask, ids = torch.ones(3, dtype=torch.bool), tensor([0, 0, 1])
    weights = correction.correction_weights(cfg.algorithm, old, old.detach(), mask, ids, 2)
    assert weights.weights.tolist() == [1.0, 1.0, 1.0] and not weights.changed.any()
    assert not weights.weights.requires_grad


@pytest.mark.parametrize("size", [30.0, 90.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_ratios_of_counted_tokens_stay_finite(size: float, sign: float) -> None:
    """Clamped where verl and SkyRL clamp: log-ratios at 20 nats (GSPO's at 10), k3 at 10."""
    mask, ids, old = torch.ones(2, dtype=torch.bool), tensor([0, 1]), tensor([-0.5, -0.5])
    for estimator in estimators.names():
        for advantage in (1.0, -1.0):
            logprobs = (old + sign * size).requires_grad_()
            cfg = config(**{"algorithm.estimator": estimator})
            loss = losses.policy_loss(cfg.algorithm, logprobs, old, torch.full((2,), advantage), mask, ids, 2).loss
            loss.sum().backward()
            assert torch.isfinite(loss).all() and torch.isfinite(logprobs.grad).all(), (estimator, advantage)
    assert torch.isfinite(correction.tis(tensor([sign * size]), 2.0).weights).all()
    logprobs = tensor([0.0]).requires_grad_()
    k3 = losses.kl_estimate(KlEstimator.k3, logprobs, tensor([sign * size]))
    k3.sum().backward()
    assert k3.item() == 10.0 and logprobs.grad.item() == 0.0
