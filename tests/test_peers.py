"""Losses, advantages and corrections against plain numpy, and against verl and TRL where they are installed.

The numpy formulas are the oracle: they are written from the papers, with their gradients worked out by hand, and every case runs
on 139 random batches. verl 0.9 (`pip install verl`, with tensordict and ray) and TRL 1.16 say the same; their tests are skipped
where the package is missing. slime and SkyRL, which agree in what is compared here, cannot be imported from PyPI.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from runner.algorithms import estimators
from runner.algorithms.advantages import compute_advantages
from runner.algorithms.aggregation import loss_weights
from runner.config.choices import KlEstimator
from runner.config.schema import AlgorithmConfig, Correction, LossAggregation
from runner.data import Sample, Status
from runner.trainer.policy_step import Sums, TokenRows, micro_batch_loss
from tests.trainer_configs import config

INPUTS = 139
LONGEST = 12
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Random:
    """A batch [B, T] of random numbers, masks and advantages (one per sequence)."""

    logprobs: Array
    old: Array
    rollout: Array
    reference: Array
    advantages: Array
    mask: Array


def _random(seed: int, spread: float = 0.4) -> Random:
    random = np.random.default_rng(seed)
    shape = (int(random.integers(2, 6)), LONGEST)
    old = -3 * random.random(shape)
    mask = (random.random(shape) > 0.25) & (np.arange(LONGEST) < random.integers(2, LONGEST + 1, size=(shape[0], 1)))
    mask[:, 0] = True
    near = [old + spread * random.normal(size=shape) for _ in range(3)]
    rows = [row.astype(np.float32).astype(np.float64) for row in (near[0], old, near[1], near[2])]
    advantages = np.repeat(random.normal(size=(shape[0], 1)), LONGEST, axis=1).astype(np.float32).astype(np.float64)
    return Random(*rows, advantages, mask.astype(np.float64))


# ---- the oracle


def _policy(algorithm: AlgorithmConfig, x: Random) -> tuple[Array, Array]:
    """(loss, gradient with respect to logprobs) of every token."""
    low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
    ratio = np.exp(x.logprobs - x.old)
    if algorithm.estimator == "cispo":
        weight = np.clip(ratio, low, high)
        return -weight * x.advantages * x.logprobs, -weight * x.advantages
    if algorithm.estimator == "gspo":
        mean = ((x.logprobs - x.old) * x.mask).sum(1) / x.mask.sum(1)
        ratio = np.repeat(np.exp(mean)[:, None], LONGEST, axis=1)
    plain, clipped = -x.advantages * ratio, -x.advantages * np.clip(ratio, low, high)
    loss, gradient = np.maximum(plain, clipped), np.where(plain >= clipped, plain, 0.0)
    if algorithm.dual_clip:
        beyond = (x.advantages < 0) & (loss > -x.advantages * algorithm.dual_clip)
        loss, gradient = np.where(beyond, -x.advantages * algorithm.dual_clip, loss), np.where(beyond, 0.0, gradient)
    return loss, gradient


def _correction(algorithm: AlgorithmConfig, x: Random) -> Array:
    ratio = np.exp(x.old - x.rollout)
    low, high = algorithm.correction_low, algorithm.correction_high
    if algorithm.correction is Correction.none:
        return np.ones_like(ratio)
    if algorithm.correction is Correction.tis:
        return np.minimum(ratio, high)
    if algorithm.correction is Correction.mis:
        ratio = np.repeat(np.exp(((x.old - x.rollout) * x.mask).sum(1))[:, None], LONGEST, axis=1)
    return np.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _kl(name: str, x: Random) -> tuple[Array, Array]:
    difference = x.logprobs - x.reference
    if name == "k1":
        return difference, np.ones_like(difference)
    if name == "k2":
        return difference**2 / 2, difference
    return np.exp(-difference) - 1 + difference, 1 - np.exp(-difference)


def _weights(aggregation: LossAggregation, mask: Array) -> Array:
    counts = mask.sum(1, keepdims=True)
    return {
        "token_mean": mask / mask.sum(),
        "sequence_mean": mask / len(mask),
        "sequence_mean_of_token_means": mask / counts / len(mask),
        "constant_length": mask / LONGEST / len(mask),
    }[aggregation.value]


def _oracle(algorithm: AlgorithmConfig, x: Random, with_kl: bool) -> tuple[float, Array]:
    loss, gradient = _policy(algorithm, x)
    weight, corrected = _weights(algorithm.loss_aggregation, x.mask), _correction(algorithm, x)
    loss, gradient = loss * corrected, gradient * corrected
    if with_kl:
        kl, kl_gradient = _kl(algorithm.kl_estimator, x)
        loss, gradient = loss + algorithm.kl_coef * kl, gradient + algorithm.kl_coef * kl_gradient
    return float((loss * weight).sum()), gradient * weight


# ---- ours


def _ours(algorithm: AlgorithmConfig, x: Random, with_kl: bool) -> tuple[float, Array]:
    def flat(row: Array) -> torch.Tensor:
        return torch.from_numpy(row.reshape(-1)).float()

    masks = [torch.from_numpy(row > 0) for row in x.mask]
    weights = loss_weights(algorithm.loss_aggregation, masks, LONGEST)
    logprobs = flat(x.logprobs).requires_grad_()
    rows = TokenRows(
        advantages=flat(x.advantages),
        mask=torch.cat(masks),
        weights=torch.cat(weights.rows),
        rollout_logprobs=flat(x.rollout),
        sample_ids=torch.arange(len(masks)).repeat_interleave(LONGEST),
        num_samples=len(masks),
        old_logprobs=flat(x.old),
        ref_logprobs=flat(x.reference) if with_kl else None,
    )
    loss = micro_batch_loss(algorithm, logprobs, torch.zeros_like(logprobs), rows, weights, Sums())
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.double().numpy().reshape(x.mask.shape)


def _algorithm(**changes: object) -> AlgorithmConfig:
    return config(**{f"algorithm.{key}": value for key, value in changes.items()}).algorithm


def _assert_equal(found: tuple[float, Array], expected: tuple[float, Array]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


CLIPS: dict[str, dict[str, float]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0},
    "reinforce_pp": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
    "gspo": {"clip_low": 0.02, "clip_high": 0.04, "dual_clip": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 0.5, "dual_clip": 0.0},
}
BOUNDS = {Correction.none: (1.0, 1.0), Correction.tis: (0.0, 1.3), Correction.mis: (0.4, 2.0), Correction.icepop: (0.7, 1.4)}


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("aggregation", list(LossAggregation))
def test_losses_are_those_of_the_formulas(estimator: str, aggregation: LossAggregation) -> None:
    for seed in range(INPUTS):
        kind, kl = list(Correction)[seed % 4], ("k1", "k2", "k3")[seed % 3]
        algorithm = _algorithm(
            estimator=estimator, loss_aggregation=aggregation, **CLIPS[estimator], correction=kind, kl_estimator=kl, kl_coef=0.05,
            correction_low=BOUNDS[kind][0], correction_high=BOUNDS[kind][1],
        )  # fmt: skip
        x = _random(seed)
        _assert_equal(_ours(algorithm, x, with_kl=bool(seed % 2)), _oracle(algorithm, x, with_kl=bool(seed % 2)))


def _group(rewards: Array, mask: Array) -> list[Sample]:
    return [
        Sample(
            prompt_id="p", sample_index=index, tokens=torch.zeros(2 + LONGEST, dtype=torch.int64), response_length=LONGEST,
            loss_mask=torch.from_numpy(row > 0), rollout_logprobs=torch.zeros(LONGEST), status=Status.completed,
            finish_reason="stop", reward=float(reward),
        )
        for index, (reward, row) in enumerate(zip(rewards, mask, strict=True))
    ]  # fmt: skip


def _rewards(seed: int) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    return np.round(random.normal(size=6), 2), (random.random((6, LONGEST)) > 0.3).astype(np.float64)


def test_advantages_are_those_of_the_formulas() -> None:
    for seed in range(INPUTS):
        rewards, mask = _rewards(seed)
        grpo = compute_advantages(_algorithm(), [_group(rewards, mask)])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        np.testing.assert_allclose([float(row[0]) for row in grpo], expected, rtol=1e-4, atol=1e-6)
        whitened = compute_advantages(_algorithm(estimator="reinforce_pp"), [_group(rewards, mask)])
        tokens = np.repeat(rewards, mask.sum(1).astype(int))
        expected = (rewards - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
        np.testing.assert_allclose([float(row[0]) for row in whitened], expected, rtol=1e-4, atol=1e-6)


# ---- verl

VERL_AGGREGATION = {
    LossAggregation.token_mean: "token-mean",
    LossAggregation.sequence_mean: "seq-mean-token-sum",
    LossAggregation.sequence_mean_of_token_means: "seq-mean-token-mean",
    LossAggregation.constant_length: "seq-mean-token-sum-norm",
}
VERL_LOSS = {"grpo": "vanilla", "reinforce_pp": "vanilla", "gspo": "gspo", "cispo": "cispo"}


def _verl(algorithm: AlgorithmConfig, x: Random) -> tuple[float, Array]:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    actor = pytest.importorskip("verl.workers.config")
    settings = actor.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=algorithm.clip_low,
        clip_ratio_high=algorithm.clip_high, clip_ratio_c=algorithm.dual_clip or 1e9,
    )  # fmt: skip
    old, rollout, mask, advantages = (torch.from_numpy(row).float() for row in (x.old, x.rollout, x.mask, x.advantages))
    weights: torch.Tensor | None = None
    low, high = algorithm.correction_low, algorithm.correction_high
    if algorithm.correction is Correction.mis:
        weights, _ = helper.compute_rollout_correction_weights(old - rollout, mask, "sequence", f"{low}_{high}")
    elif algorithm.correction is not Correction.none:
        bound = high if algorithm.correction is Correction.tis else f"{low}_{high}"
        weights, _ = helper.compute_rollout_correction_weights(old - rollout, mask, "token", bound)
    logprobs = torch.from_numpy(x.logprobs).float().requires_grad_()
    loss, _ = core.get_policy_loss_fn(VERL_LOSS[algorithm.estimator])(
        old_log_prob=old, log_prob=logprobs, advantages=advantages, response_mask=mask,
        loss_agg_mode=VERL_AGGREGATION[algorithm.loss_aggregation], config=settings, rollout_is_weights=weights,
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.double().numpy()


@pytest.mark.parametrize("estimator", estimators.names())
@pytest.mark.parametrize("aggregation", list(LossAggregation))
def test_losses_are_those_of_verl(estimator: str, aggregation: LossAggregation) -> None:
    for seed in range(INPUTS):
        kind = list(Correction)[seed % 4]
        algorithm = _algorithm(
            estimator=estimator, loss_aggregation=aggregation, **CLIPS[estimator], correction=kind,
            correction_low=BOUNDS[kind][0], correction_high=BOUNDS[kind][1],
        )  # fmt: skip
        x = _random(seed, spread=0.4 if seed % 5 else 15.0)  # some far beyond the clamps
        if not (_correction(algorithm, x) * x.mask).any():
            continue  # everything is rejected: verl's metrics divide by zero
        _assert_equal(_ours(algorithm, x, with_kl=False), _verl(algorithm, x))


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators_are_those_of_verl(name: str) -> None:
    from runner.algorithms.losses import kl_estimate

    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    for seed in range(INPUTS):
        x, results = _random(seed, spread=0.4 if seed % 3 else 15.0), []
        for function in (lambda a, b: kl_estimate(KlEstimator(name), a, b), lambda a, b: core.kl_penalty(a, b, name)):
            logprobs = torch.from_numpy(x.logprobs).float().requires_grad_()
            value = function(logprobs, torch.from_numpy(x.reference).float())
            value.sum().backward()
            results.append((value.detach(), logprobs.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_advantages_are_those_of_verl() -> None:
    core = pytest.importorskip("verl.trainer.ppo.core_algos")
    for seed in range(INPUTS):
        rewards, mask = _rewards(seed)
        token_rewards, response_mask = torch.zeros(6, LONGEST), torch.from_numpy(mask).float()
        last = response_mask.cumsum(1).argmax(1)
        token_rewards[torch.arange(6), last] = torch.from_numpy(rewards).float()
        grpo, _ = core.compute_grpo_outcome_advantage(token_rewards, response_mask, np.zeros(6, dtype=np.int64))
        plus, _ = core.compute_reinforce_plus_plus_outcome_advantage(token_rewards, response_mask, SimpleNamespace(gamma=1.0))
        for estimator, theirs in (("grpo", grpo), ("reinforce_pp", plus)):
            ours = torch.stack(compute_advantages(_algorithm(estimator=estimator), [_group(rewards, mask)]))
            torch.testing.assert_close(ours * response_mask, theirs.float(), rtol=1e-4, atol=1e-5)


# ---- TRL

TRL_LOSS = {
    LossAggregation.token_mean: "bnpo",
    LossAggregation.sequence_mean_of_token_means: "grpo",
    LossAggregation.constant_length: "dr_grpo",
}


def _trl(algorithm: AlgorithmConfig, x: Random, with_kl: bool) -> tuple[float, Array]:
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    logprobs = torch.from_numpy(x.logprobs).float().requires_grad_()
    entropies = torch.zeros_like(logprobs.detach())
    cispo = algorithm.estimator == "cispo"
    mask = torch.from_numpy(x.mask)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropies, None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="sequence" if algorithm.estimator == "gspo" else "token",
        beta=algorithm.kl_coef if with_kl else 0.0, loss_type="cispo" if cispo else TRL_LOSS[algorithm.loss_aggregation],
        epsilon_low=algorithm.clip_low, epsilon_high=1 + algorithm.clip_high if cispo else algorithm.clip_high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda tensor: tensor, reduce=lambda tensor, reduction: tensor
        ),
        _metrics={"train": _Metrics()},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(x.mask), 1, dtype=torch.int64), "prompt_mask": torch.ones(len(x.mask), 1),
        "completion_ids": torch.zeros(x.mask.shape, dtype=torch.int64), "completion_mask": mask,
        "advantages": torch.from_numpy(x.advantages[:, 0]).float(), "old_per_token_logps": torch.from_numpy(x.old).float(),
        "ref_per_token_logps": torch.from_numpy(x.reference).float(), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(stub, None, inputs)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.double().numpy()


class _Metrics(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return []


@pytest.mark.parametrize(
    ("estimator", "aggregation"),
    [("grpo", aggregation) for aggregation in TRL_LOSS]
    + [("gspo", LossAggregation.sequence_mean_of_token_means), ("cispo", LossAggregation.token_mean)],
)
def test_losses_are_those_of_trl(estimator: str, aggregation: LossAggregation) -> None:
    """TRL's CISPO has no lower bound, ours is at 0 here."""
    for seed in range(INPUTS):
        algorithm = _algorithm(estimator=estimator, loss_aggregation=aggregation, **CLIPS[estimator], kl_coef=0.05)
        x, with_kl = _random(seed), bool(seed % 2)
        _assert_equal(_ours(algorithm, x, with_kl), _trl(algorithm, x, with_kl))
