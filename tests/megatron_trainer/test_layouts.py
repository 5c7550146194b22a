"""Every CPU layout against one rank: logprobs, losses, gradient norms, updated weights, exported HF tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from runner.config.schema import Config, Correction, LossAggregation, QatPlacement
from runner.models.vocabulary import PAD_ID
from runner.trainer.torch.trainer import TorchTrainer
from tests.megatron_trainer.configs import LAYOUTS, MODELS, megatron_config
from tests.megatron_trainer.scenario import Result, assert_close, batch, megatron, run
from tests.trainer_configs import batch as random_batch
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron

FP32 = {"format": "bf16", "precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward}
CASES = [("moe", layout) for layout in LAYOUTS if layout not in ("single", "tp2")]
CASES += [("dense", "tp2"), ("dense", "pp2"), ("mla", "tp2_sp"), ("mla", "pp2"), ("mla_q", "cp2"), ("mtp", "tp2"), ("mtp", "pp2")]
# Tried with every change: every way of cutting once, all of them together (mix4), and every kind of model. The others by night.
DAILY = [("moe", "mix4"), ("moe", "cp2"), ("moe", "etp2"), ("dense", "pp2"), ("mla", "tp2_sp"), ("mtp", "tp2")]
_single: dict[str, Result] = {}


def _config(model: str, layout: str) -> Config:
    return megatron_config(model, layout, **FP32, **{"router_replay.trainer": True})


def _one_rank(model: str) -> Result:
    if model not in _single:
        with megatron(_config(model, "single")) as trainer:
            _single[model] = run(trainer, trainer.cfg)
    return _single[model]


def _assert_same(ours: Result, theirs: Result) -> None:
    """fp32: sums in another order. Adam's first steps are signs, so a gradient of almost zero may move the other way."""
    assert_close(ours, theirs, logprob=3e-6, relative=2e-5, weight=0.05)
    moved = [(tensor.float() - theirs.weights[name].float()).abs().flatten() for name, tensor in ours.weights.items()]
    assert (torch.cat(moved) > 4e-3).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("model", "layout"), [case if case in DAILY else pytest.param(*case, marks=pytest.mark.night) for case in CASES]
)
def test_a_layout_computes_what_one_rank_computes(model: str, layout: str) -> None:
    cfg = _config(model, layout)
    with megatron(cfg) as trainer:
        ours = run(trainer, cfg)
    _assert_same(ours, _one_rank(model))
    if cfg.model.num_experts:
        theirs = _one_rank(model).metrics[0]["router_replay/disagreement"]
        assert abs(ours.metrics[0]["router_replay/disagreement"] - theirs) < 5e-3


@pytest.mark.parametrize("model", MODELS)
def test_one_rank_computes_what_the_torch_trainer_computes(model: str) -> None:
    """The transformers model is the oracle: logits, gradients and updates of every family, and the exported names."""
    ours = _one_rank(model)
    cfg = config(MODELS[model], **FP32, **{"router_replay.trainer": True})
    _assert_same(ours, run(TorchTrainer(cfg), cfg))


def test_int4_with_replay_follows_the_torch_trainer() -> None:
    """The first steps of `parallelism=cpu2`. bf16: logprobs differ by rounding of two implementations, about 2e-2 at most on
    this model, gradient norms by 2%; the integers by what such gradients move."""
    changes: dict[str, object] = {"format": "int4", "router_replay.trainer": True, "trainer.optimizer.lr": 1e-3}
    cfg = megatron_config("moe", "tp2_sp", **changes)
    with megatron(cfg) as trainer:
        ours = run(trainer, cfg, steps=3)
    torch_cfg = config(MODELS["moe"], **changes)
    theirs = run(TorchTrainer(torch_cfg), torch_cfg, steps=3)
    assert_close(ours, theirs, logprob=4e-2, relative=2e-2, weight=1e-2)
    scales = [name for name in ours.packed if name.endswith("weight_scale")]
    assert scales and ours.packed.keys() == theirs.packed.keys()
    same = [(ours.packed[name] == theirs.packed[name]).float().mean() for name in scales]
    assert torch.stack(same).mean() > 0.8


def test_losses_over_whole_sequences_and_several_updates() -> None:
    """GSPO's sequence ratio and MIS' sequence weight need every context-parallel rank's tokens; the second update needs old
    logprobs of before the first."""
    changes: dict[str, object] = {
        "algorithm.estimator": "gspo",
        "algorithm.correction": Correction.mis,
        "algorithm.correction_high": 2.0,
        "algorithm.updates_per_rollout": 2,
        "algorithm.entropy_coef": 0.01,
        "algorithm.kl_coef": 0.05,
        "router_replay.trainer": True,
        **FP32,
    }
    results = []
    for layout in ("single", "cp2"):
        cfg = megatron_config("moe", layout, **changes)
        with megatron(cfg) as trainer:
            results.append(run(trainer, cfg))
    assert_close(results[1], results[0], logprob=3e-6, relative=1e-3, weight=0.05)
    assert max(row["train/tis_clipfrac"] for row in results[0].metrics) > 0 and results[0].metrics[1]["train/kl_loss"] > 0
    torch_cfg = config(MODELS["moe"], **changes)
    assert_close(results[0], run(TorchTrainer(torch_cfg), torch_cfg), logprob=3e-6, relative=2e-3, weight=0.05)


# Adam with a huge epsilon is gradient descent of rate lr / eps: what the policy is after a step shows every part of the gradient
DESCENT = {
    "trainer.optimizer.eps": 1e3,
    "trainer.optimizer.lr": 10.0,
    "trainer.optimizer.clip_grad_norm": 1e6,
    "trainer.optimizer.weight_decay": 0.0,
}


@pytest.mark.parametrize(
    ("layout", "aggregation", "estimator"),
    [
        ("cp2", LossAggregation.sequence_mean_of_token_means, "gspo"),
        ("cp2", LossAggregation.sequence_mean, "grpo"),
        ("dp2", LossAggregation.sequence_mean_of_token_means, "grpo"),
        ("tp2_sp", LossAggregation.constant_length, "grpo"),
    ],
)
def test_a_divided_step_has_the_gradient_of_the_whole_one(layout: str, aggregation: LossAggregation, estimator: str) -> None:
    """Several packed micro-batches per rank, tokens, samples and layers divided over ranks, against the torch trainer with all
    samples in one batch; with another aggregation the policy after the step is another one."""
    changes: dict[str, object] = {
        "algorithm.estimator": estimator,
        "algorithm.loss_aggregation": aggregation,
        "algorithm.kl_coef": 0.05,
        "algorithm.entropy_coef": 0.01,
        "rollout.sampling.max_response_tokens": 16,
        **FP32,
        **DESCENT,
    }
    divided = megatron_config("dense", layout, **changes, **{"trainer.max_tokens_per_gpu": 24})
    with megatron(divided) as trainer:
        metrics, moved = _after_a_step(trainer, divided)
    expected_metrics, expected = _whole_step(aggregation, changes)
    assert (moved - expected).abs().max() < 1e-4 * expected.abs().max()
    for name in ("train/loss", "train/pg_loss", "train/grad_norm"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name
    _, other = _whole_step(LossAggregation.token_mean, changes)
    assert (other - expected).abs().max() > 0.1 * expected.abs().max()


def _whole_step(aggregation: LossAggregation, changes: dict[str, object]) -> tuple[dict[str, float], torch.Tensor]:
    changes = {**changes, "algorithm.loss_aggregation": aggregation, "trainer.max_tokens_per_gpu": 10_000}
    cfg = config(MODELS["dense"], **changes)
    return _after_a_step(TorchTrainer(cfg), cfg)


def test_a_turns_advantage_stays_with_its_tokens() -> None:
    """Two turns of a sample with advantages of their own (algorithm.turn_credit), tokens packed and divided over ranks, against
    the torch trainer; with one advantage for both turns the policy after the step is another one."""
    changes: dict[str, object] = {**FP32, **DESCENT}
    divided = megatron_config("dense", "cp2", **changes, **{"trainer.max_tokens_per_gpu": 24})
    with megatron(divided) as trainer:
        metrics, moved = _after_a_step(trainer, divided, turns=True)
    cfg = config(MODELS["dense"], **changes)
    expected_metrics, expected = _after_a_step(TorchTrainer(cfg), cfg, turns=True)
    assert (moved - expected).abs().max() < 1e-4 * expected.abs().max()
    assert metrics["train/pg_loss"] == pytest.approx(expected_metrics["train/pg_loss"], rel=1e-4, abs=1e-6)
    _, other = _after_a_step(TorchTrainer(cfg), cfg)
    assert (other - expected).abs().max() > 0.1 * expected.abs().max()


def _after_a_step(trainer: Any, cfg: Config, turns: bool = False) -> tuple[dict[str, float], torch.Tensor]:
    """(a step's metrics, how far it moved the policy's logprobs); the old policy and the reference are near the policy. `turns`:
    the second half of a sample has another advantage than the first."""
    data, other = random_batch(cfg), random_batch(cfg, seed=1)
    if turns:
        for advantages in data.advantages:
            advantages[len(advantages) // 2 :] *= -0.5
    for sample in (*data.samples, *other.samples):
        sample.tokens[sample.tokens == PAD_ID] = PAD_ID + 1  # its zero embedding would move out of proportion
    old = [row + 0.02 * (-1) ** index for index, row in enumerate(trainer.logprobs(data))]
    data = replace(data, old_logprobs=old, ref_logprobs=[row + 0.3 for row in old])
    before = torch.cat(trainer.logprobs(other))
    return trainer.step(data).metrics, torch.cat(trainer.logprobs(other)) - before


def test_fewer_samples_than_data_parallel_ranks() -> None:
    """The rank without a sample computes padding, takes part in every collective, and changes nothing."""
    found = []
    for layout in ("single", "ep2"):
        cfg = _config("moe", layout)
        with megatron(cfg) as trainer:
            one = batch(cfg, size=1)
            logprobs = trainer.logprobs(one)[0]
            metrics = trainer.step(one).metrics
            found.append((logprobs, metrics["train/grad_norm"], torch.cat(trainer.logprobs(batch(cfg, size=3, seed=1)))))
    assert torch.allclose(found[0][0], found[1][0], atol=3e-6)
    assert abs(found[0][1] - found[1][1]) < 1e-4 * found[0][1]
    assert torch.allclose(found[0][2], found[1][2], atol=1e-3)
