"""FP8 on CPU ranks, simulated: the torch trainer's FP8 step, also where tensor parallelism divides the weights.

A sum in another order moves an activation across an e4m3 rounding boundary now and then, which is a step of 1/16 of it: hence
means beside maxima.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from runner.config.schema import QatPlacement, Role
from runner.errors import UserError
from runner.trainer.torch.trainer import TorchTrainer
from tests.megatron_trainer.configs import MODELS, megatron_config
from tests.megatron_trainer.scenario import Result, exported, megatron, run
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron

# A tensor-parallel shard of two holds 128 outputs of q, k, v, gate and up, and 128 inputs of o and down.
FP8: dict[str, object] = {
    "format": "fp8",
    "precision.train.group_size": 128,
    "precision.rollout.group_size": 128,
    "precision.roles": [Role.attention, Role.dense_mlp, Role.routed_expert, Role.shared_expert],
    "router_replay.trainer": True,
    "trainer.optimizer.lr": 1e-3,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 128,
    "model.hidden_size": 128,
    "model.ffn_size": 256,
    "model.initializer_range": 0.05,
}
FP32: dict[str, object] = {"precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward}
# with gradients in FP8 for experts, without for the dense model
CASES: dict[str, dict[str, object]] = {
    "dense": {},
    "moe": {"precision.fp8_backward": True, "model.expert_ffn_size": 256},
}


def _megatron(model: str, layout: str, **changes: object) -> Result:
    cfg = megatron_config(model, layout, **FP8, **CASES[model], **changes)
    with megatron(cfg) as trainer:
        return run(trainer, cfg)


@cache
def _one_rank(model: str) -> Result:
    return _megatron(model, "single", **FP32)


def _torch(model: str, **changes: object) -> Result:
    cfg = config(MODELS[model], **FP8 | CASES[model] | FP32 | changes)
    return run(TorchTrainer(cfg), cfg)


def _mean_difference(ours: Result, theirs: Result) -> float:
    return float((ours.logprobs - theirs.logprobs).abs().mean())


def _assert_same_steps(ours: Result, theirs: Result, logprob: float) -> None:
    """Mean logprob difference before the first update; losses of 1e-4, entropies and gradient norms of 1 % in both updates."""
    assert _mean_difference(ours, theirs) < logprob
    assert (ours.logprobs - theirs.logprobs).abs().max() < 0.05
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], abs=1e-4)
        for name in ("train/entropy_loss", "train/grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-2), name
    scales = [name for name in ours.packed if name.endswith("weight_scale_inv")]
    assert scales and ours.packed.keys() == theirs.packed.keys()
    same = [(ours.packed[name] == theirs.packed[name]).float().mean() for name in scales]
    assert torch.stack(same).mean() > 0.9


@pytest.mark.parametrize("model", CASES)
def test_one_rank_computes_the_torch_trainers_fp8_step(model: str) -> None:
    """And nothing like the step without FP8."""
    ours, theirs = _one_rank(model), _torch(model)
    _assert_same_steps(ours, theirs, logprob=3e-3)
    plain = _torch(model, **{"format": "bf16", "precision.fp8_backward": False})
    assert _mean_difference(theirs, plain) > 5 * max(_mean_difference(ours, theirs), 1e-3)


@pytest.mark.parametrize(("model", "layout"), [("dense", "tp2"), ("moe", "etp2")])
def test_shards_have_the_blocks_of_the_whole(model: str, layout: str) -> None:
    _assert_same_steps(_megatron(model, layout, **FP32), _one_rank(model), logprob=3e-3)


def test_in_place_equals_fake_quantization_in_the_forward_and_exports_what_it_computes_with() -> None:
    """bf16 with masters, two ranks: the same bits; and the first export is the torch trainer's, bit for bit."""
    in_place = _megatron("dense", "tp2")
    forward = _megatron("dense", "tp2", **{"precision.qat_placement": QatPlacement.forward})
    assert torch.equal(in_place.logprobs, forward.logprobs) and in_place.metrics == forward.metrics
    assert all(torch.equal(tensor, forward.packed[name]) for name, tensor in in_place.packed.items())
    cfg = megatron_config("moe", "etp2", **FP8, **CASES["moe"])
    with megatron(cfg) as trainer:
        first = exported(trainer, "rollout")
    theirs = exported(TorchTrainer(config(MODELS["moe"], **FP8 | CASES["moe"])), "rollout")
    assert first.keys() == theirs.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_a_shard_that_would_cut_a_block_is_refused() -> None:
    cfg = megatron_config("dense", "tp2", **FP8 | {"model.ffn_size": 128})
    with (
        pytest.raises(UserError, match=r"linear_fc1.weight has 64 outputs per rank.*cuts a group of 128"),
        megatron(cfg),
    ):
        pass
