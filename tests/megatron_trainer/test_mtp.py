"""MTP layers trained on Megatron ranks: what the torch trainer learns, on every layout, and unseen by the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runner.config.schema import QatPlacement
from runner.errors import UserError
from runner.trainer.megatron import MegatronTrainer
from runner.trainer.torch.trainer import TorchTrainer
from tests.megatron_trainer.configs import MODELS, megatron_config
from tests.megatron_trainer.scenario import batch, exported, megatron
from tests.trainer_configs import config

pytestmark = pytest.mark.megatron

ONLINE: dict[str, object] = {"speculative.online_training": True, "speculative.mtp_loss_coef": 0.2}
FP32: dict[str, object] = {"format": "bf16", "precision.base_dtype": "float32", "precision.qat_placement": QatPlacement.forward}


def _run(trainer: object, steps: int = 3) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    cfg = trainer.cfg  # type: ignore[attr-defined]
    metrics = [trainer.step(batch(cfg, seed=seed)).metrics for seed in range(steps)]  # type: ignore[attr-defined]
    return metrics, exported(trainer, "bf16")


def _is_mtp(name: str) -> bool:
    return ".mtp_layers." in name


@pytest.mark.parametrize("layout", ["single", "tp2_sp", "cp2", "dp2"])
def test_layers_learn_what_the_torch_trainer_teaches_them(layout: str) -> None:
    """fp32. Adam's first steps are signs, so a gradient of almost zero may move the other way: 1 weight in 1,000."""
    cfg = config(MODELS["mtp"], **FP32, **ONLINE)
    expected, there = _run(TorchTrainer(cfg))
    with megatron(megatron_config("mtp", layout, **FP32, **ONLINE)) as trainer:
        found, here = _run(trainer)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/mtp_loss"] == pytest.approx(theirs["train/mtp_loss"], rel=1e-4)
        assert ours["train/mtp_grad_norm"] == pytest.approx(theirs["train/mtp_grad_norm"], rel=1e-3)
    moved = torch.cat([(here[name].float() - there[name].float()).abs().flatten() for name in there if _is_mtp(name)])
    assert (moved > 4e-3).float().mean() < 1e-3


def test_the_policy_gets_the_same_bits_with_and_without() -> None:
    """INT4 in place on two tensor-parallel ranks: metrics and weights of three clipped updates."""
    with megatron(megatron_config("mtp", "tp2_sp", format="int4")) as trainer:
        expected, there = _run(trainer)
    with megatron(megatron_config("mtp", "tp2_sp", format="int4", **ONLINE)) as trainer:
        found, here = _run(trainer)
    losses = [row.pop("train/mtp_loss") for row in found]
    assert all(row.pop("train/mtp_grad_norm") > 0 for row in found)
    assert found == expected
    assert here.keys() == there.keys() and len(losses) == 3
    for name, tensor in there.items():
        assert torch.equal(tensor, here[name]) != _is_mtp(name), name


def test_the_loss_falls_and_a_resume_repeats_it(tmp_path: Path) -> None:
    cfg = megatron_config("mtp", "dp2", format="int4", **ONLINE)
    with megatron(cfg) as trainer:
        losses = [trainer.step(batch(cfg)).metrics["train/mtp_loss"] for _ in range(6)]
        trainer.save(tmp_path)
        expected = [trainer.step(batch(cfg)).metrics for _ in range(2)]
        weights = exported(trainer, "bf16")
    assert losses[-1] < 0.8 * losses[0], losses
    with megatron(cfg) as resumed:
        resumed.load(tmp_path)
        assert [resumed.step(batch(cfg)).metrics for _ in range(2)] == expected
        assert all(torch.equal(tensor, weights[name]) for name, tensor in exported(resumed, "bf16").items())
    with megatron(megatron_config("mtp", "single", format="int4")) as without:
        without.load(tmp_path)  # a layout and a run that do not train them
        assert without.step(batch(cfg)).metrics.keys() == expected[0].keys() - {"train/mtp_loss", "train/mtp_grad_norm"}


def test_pipeline_stages_have_no_embedding_for_it() -> None:
    with pytest.raises(UserError, match="another pipeline stage"):
        MegatronTrainer(megatron_config("mtp", "pp2", **ONLINE))
