"""Every CPU layout against one rank: logprobs, losses, gradient norms, updated weights, exported HF tensors."""

from __future__ import annotations

import pytest
import torch

from runner.schema import Config, QatPlacement
from runner.trainer.torch_trainer import TorchTrainer
from tests.megatron_trainer.configs import LAYOUTS, MODELS, megatron_config
from tests.megatron_trainer.scenario import Result, assert_close, megatron, run
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron

FP32 = {"format": "bf16", "precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward}
CASES = [("moe", layout) for layout in LAYOUTS if layout not in ("single", "tp2")]
CASES += [("dense", "tp2"), ("dense", "pp2"), ("mla", "tp2_sp"), ("mla", "pp2"), ("mla_q", "cp2"), ("mtp", "tp2")]
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


@pytest.mark.parametrize(("model", "layout"), CASES)
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
