"""Checkpoints: a resume that never shows, other layouts, and the faults that Megatron's own formats have without an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runner.config.schema import Config
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights, save_config
from runner.precision import int4
from runner.precision.codec import encode_all
from runner.precision.plan import PrecisionPlan
from runner.trainer.megatron import MegatronTrainer
from runner.trainer.megatron.sources import open_weights
from tests.megatron_trainer.configs import megatron_config
from tests.megatron_trainer.scenario import batch, exported, megatron

pytestmark = pytest.mark.megatron

QAT: dict[str, object] = {"format": "int4", "router_replay.trainer": True}
# 1,000 elements per bucket: parameters end at odd places, every bucket is padded, and shards cut parameters
BUCKETS: dict[str, object] = {"trainer.grad_bucket_elements": 1000}


def _config(layout: str, **changes: object) -> Config:
    return megatron_config("moe", layout, **QAT, **changes)


def _steps(trainer: object, cfg: Config, seeds: range) -> list[dict[str, float]]:
    return [trainer.step(batch(cfg, seed=seed)).metrics for seed in seeds]  # type: ignore[attr-defined]


def _differing_integers(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Share of INT4 integers that differ."""
    pairs = [(ours[name], theirs[name]) for name in ours if name.endswith("weight_packed")]
    assert pairs
    differ = [(int4.unpack(a, a.shape[1] * 8) != int4.unpack(b, b.shape[1] * 8)).flatten() for a, b in pairs]
    return float(torch.cat(differ).float().mean())


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp"])
def test_a_resumed_run_repeats_the_uninterrupted_one(layout: str, tmp_path: Path) -> None:
    """Losses, gradient norms and every exported bit. A shared Adam step, or moments in wrong places, would show in step 1."""
    cfg = _config(layout, **BUCKETS)
    with megatron(cfg) as trainer:
        _steps(trainer, cfg, range(3))
        at_save = exported(trainer, "bf16")
        trainer.save(tmp_path)
        expected = _steps(trainer, cfg, range(3, 6))
        weights = exported(trainer, "bf16")
    counters = json.loads((tmp_path / "trainer.json").read_text())
    assert counters["version"] == 3 and counters["adam_step"] == 3
    with megatron(cfg) as resumed:
        resumed.load(tmp_path)
        assert resumed.version == 3
        loaded = exported(resumed, "bf16")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in at_save.items())
        assert _steps(resumed, cfg, range(3, 6)) == expected
        after = exported(resumed, "bf16")
        assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


def test_every_layout_loads_what_another_saved(tmp_path: Path) -> None:
    """Masters and moments too: exports are equal bit for bit, and the next three steps give the same integers."""
    cfg = _config("dp2", **BUCKETS)
    with megatron(cfg) as trainer:
        _steps(trainer, cfg, range(2))
        trainer.save(tmp_path)
        at_save = exported(trainer, "rollout")
        plain = exported(trainer, "bf16")
        _steps(trainer, cfg, range(2, 5))
        continued = exported(trainer, "rollout")
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")  # what the converter makes of the BF16 export
    converted = {name: part for tensor in encode_all(plain.items(), plan) for name, part in tensor.parts.items()}
    assert converted.keys() == at_save.keys() and all(torch.equal(converted[name], part) for name, part in at_save.items())
    for layout in ("single", "ep2", "mix4", "etp2", "pp2", "cp2"):
        cfg = _config(layout)
        with megatron(cfg) as other:
            other.load(tmp_path)
            for name, tensor in exported(other, "rollout").items():
                assert torch.equal(tensor, at_save[name]), (layout, name)
            for name, tensor in exported(other, "bf16").items():
                assert torch.equal(tensor, plain[name]), (layout, name)
            if layout in ("etp2", "pp2", "cp2"):
                continue
            _steps(other, cfg, range(2, 5))
            # bf16 sums in another order move a few weights across a rounding boundary
            assert _differing_integers(exported(other, "rollout"), continued) < 0.03, layout


def test_a_run_may_start_from_another_runs_weights(tmp_path: Path) -> None:
    """Of another layout: the weights, fp32 masters included, and nothing else; the reference policy is those weights too."""
    changes: dict[str, object] = {"algorithm.kl_coef": 0.1}
    cfg = _config("dp2", **changes)
    with megatron(cfg) as trainer:
        _steps(trainer, cfg, range(2))
        trainer.save(tmp_path)
        expected = exported(trainer, "rollout")
    cfg = _config("tp2_sp", **changes, **{"trainer.initial_checkpoint": str(tmp_path), "seed": 77})
    with megatron(cfg) as started:
        assert started.version == 0
        assert all(torch.equal(tensor, expected[name]) for name, tensor in exported(started, "rollout").items())
        now = started.logprobs(batch(cfg), weights="master", routes="own")
        assert torch.equal(torch.cat(started.reference_logprobs(batch(cfg))), torch.cat(now))
    cfg.trainer.initial_checkpoint = str(tmp_path / "elsewhere")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="no checkpoint of a run"):
        MegatronTrainer(cfg)


def test_a_checkpoint_with_more_or_less_than_the_model_is_refused(tmp_path: Path) -> None:
    """Layers that are not all alike lie in the checkpoint one by one: those that no rank asks for would be left out silently."""
    cfg = megatron_config("moe", "single", format="int4", **{"algorithm.kl_coef": 0.1})
    cfg.model.num_layers, cfg.model.num_dense_layers = 3, 1
    with megatron(cfg) as trainer:
        trainer.save(tmp_path)
    cfg.algorithm.kl_coef = 0.0
    with megatron(cfg) as without_reference:
        without_reference.load(tmp_path)
    for layers, words in ((4, "does not fit this model"), (2, "weights that the model does not use: .* first decoder.layers.2")):
        cfg.model.num_layers = layers
        with megatron(cfg) as other, pytest.raises(UserError, match=words):
            other.load(tmp_path)


def test_a_folder_with_more_than_the_model_is_no_start(tmp_path: Path) -> None:
    """Ranks read published folders through the check that trainer=torch and the converter use."""
    cfg = megatron_config("moe", "single", format="int4")
    built = build_model(cfg.model, dtype=torch.bfloat16, seed=0)
    family = family_of(cfg.model)
    weights = {name: t.clone() for name, t in disk_tensors(family, cfg.model, named_weights(cfg.model, built))}
    save_config(cfg.model, tmp_path)
    save_file(
        weights | {"model.layers.9.input_layernorm.weight": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    cfg.model.hf_checkpoint = str(tmp_path)
    with pytest.raises(UserError, match=r"does not use: 1 weights, first model\.layers\.9"):
        open_weights(cfg, family)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    read, _ = open_weights(cfg, family)
    assert all(torch.equal(read(name), tensor) for name, tensor in weights.items())


def test_a_checkpoint_of_another_model_is_refused_with_its_name(tmp_path: Path) -> None:
    cfg = megatron_config("dense", "single", format="int4")
    with megatron(cfg) as trainer:
        trainer.save(tmp_path)
    cfg.model.ffn_size *= 2
    with megatron(cfg) as other, pytest.raises(UserError, match="does not fit this model"):
        other.load(tmp_path)
    (tmp_path / "trainer.json").write_text("{}")
    cfg.model.ffn_size //= 2
    with megatron(cfg) as other, pytest.raises(UserError, match="trainer=torch"):
        other.load(tmp_path)
