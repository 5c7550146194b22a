"""The torch trainer: QAT placements, micro-batches, resume, replay, export."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runner.config import rules
from runner.config.choices import LrSchedule
from runner.config.schema import QatPlacement
from runner.errors import UserError
from runner.precision.codec import decode
from runner.trainer.torch.trainer import TorchTrainer
from tests.configs import composed
from tests.trainer_configs import DENSE, MLA, MOE, batch, config

MODELS = {"moe": MOE, "dense": DENSE, "mla": MLA}


def _masters(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    return {name: master.clone() for name, master in trainer.optimizer.masters.items()}


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def test_a_step_changes_the_policy_and_reports() -> None:
    cfg = config()
    trainer = TorchTrainer(cfg)
    before, began = _masters(trainer), time.time()
    result = trainer.step(data := batch(cfg))
    metrics = result.metrics
    assert trainer.version == 1 and result.old_version == 0
    assert metrics["train/grad_norm"] > 0 and metrics["train/lr"] == 1e-2
    assert metrics["train/pg_clipfrac"] == 0 and metrics["train/ppo_kl"] == 0
    ((begin, end),) = result.busy
    assert began <= begin < end <= time.time()
    assert data.old_logprobs is None and len(result.old_logprobs) == len(data)  # the batch stays as it is
    assert any(not torch.equal(before[name], master) for name, master in trainer.optimizer.masters.items())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", ["int4", "mxfp4", "nvfp4", "fp8"])
def test_in_place_qat_equals_fake_quantization_in_the_forward(model: str, format: str) -> None:
    results = []
    for placement in (QatPlacement.in_place, QatPlacement.forward):
        cfg = config(MODELS[model], format=format, **{"precision.qat_placement": placement})
        trainer = TorchTrainer(cfg)
        history = [trainer.step(batch(cfg, seed=seed)).metrics for seed in range(3)]
        results.append((history, _masters(trainer), trainer.optimizer.state_tensors()))
    assert results[0][0] == results[1][0]
    _assert_equal(results[0][1], results[1][1])
    _assert_equal(results[0][2], results[1][2])


def test_quantization_changes_the_forward_and_its_gradient() -> None:
    norms = []
    for fmt in ("int4", "bf16"):
        cfg = config(format=fmt)
        norms.append(TorchTrainer(cfg).step(batch(cfg)).metrics["train/grad_norm"])
    assert norms[0] != norms[1]


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("placement", list(QatPlacement))
def test_recompute_changes_nothing(recompute: str, placement: QatPlacement) -> None:
    outcomes = []
    for kind in ("none", recompute):
        changes = {"trainer.recompute": kind, "precision.qat_placement": placement, "router_replay.trainer": True}
        cfg = config(**changes)
        trainer = TorchTrainer(cfg)
        history = [trainer.step(batch(cfg, seed=seed, routes=True)).metrics for seed in range(2)]
        outcomes.append((history, _masters(trainer)))
    assert outcomes[0][0] == outcomes[1][0]
    _assert_equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo"])
def test_micro_batching_does_not_change_the_gradient(estimator: str) -> None:
    """fp32, so that what is left is the order of additions."""
    gradients = []
    for tokens in (20, 10_000):
        cfg = config(
            **{
                "trainer.max_tokens_per_gpu": tokens,
                "precision.base_dtype": "float32",
                "algorithm.estimator": estimator,
            }
        )
        trainer = TorchTrainer(cfg)
        trainer.optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]  # keep the gradients to look at
        trainer.step(batch(cfg))
        gradients.append(trainer.optimizer._flat_grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_chunked_logprobs_have_the_same_gradient() -> None:
    gradients = []
    for chunk in (4096, 5):
        cfg = config(**{"trainer.logprob_chunk_tokens": chunk, "precision.base_dtype": "float32", "algorithm.entropy_coef": 0.01})
        trainer = TorchTrainer(cfg)
        trainer.optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]
        trainer.step(batch(cfg))
        gradients.append(trainer.optimizer._flat_grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_logprobs_are_those_of_the_plain_model() -> None:
    cfg = config(format="bf16", **{"precision.base_dtype": "float32"})
    trainer, data = TorchTrainer(cfg), batch(cfg)
    data = replace(data, temperature=0.7)
    ours = trainer.logprobs(data)
    for sample, row in zip(data.samples, ours, strict=True):
        with torch.no_grad():
            logits = trainer.model(input_ids=sample.tokens.unsqueeze(0)).logits[0].float() / 0.7
        start = sample.prompt_length - 1
        expected = torch.log_softmax(logits, -1)[start:-1].gather(1, sample.response_tokens.unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("placement", list(QatPlacement))
def test_resume_is_bit_exact(tmp_path: Path, masters: bool, placement: QatPlacement) -> None:
    changes = {"trainer.master_weights": masters, "precision.qat_placement": placement, "algorithm.kl_coef": 0.1}
    changes["trainer.optimizer.lr_schedule"] = "cosine"
    cfg = config(**changes)
    straight = TorchTrainer(cfg)
    stopped = TorchTrainer(cfg)
    for seed in range(2):
        assert straight.step(batch(cfg, seed=seed)).metrics == stopped.step(batch(cfg, seed=seed)).metrics
    stopped.save(tmp_path)
    cfg.seed += 1  # another random start, to be overwritten
    resumed = TorchTrainer(cfg)
    resumed.load(tmp_path)
    assert resumed.version == 2
    for seed in range(2, 4):
        assert straight.step(batch(cfg, seed=seed)).metrics == resumed.step(batch(cfg, seed=seed)).metrics
    _assert_equal(_masters(straight), _masters(resumed))
    for left, right in zip(straight.export(), resumed.export(), strict=True):
        _assert_equal(left.parts, right.parts)


def test_checkpoint_holds_unquantized_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = TorchTrainer(cfg := config())
    trainer.step(batch(cfg))
    trainer.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    master = trainer.optimizer.masters["model.layers.0.mlp.experts.gate_up_proj"][1, 32:]
    resident = trainer.optimizer.params["model.layers.0.mlp.experts.gate_up_proj"][1, 32:]
    assert torch.equal(saved[name], master.to(torch.bfloat16))
    assert not torch.equal(saved[name], resident)


def test_transformers_loads_the_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = TorchTrainer(cfg := config(format="bf16"))
    trainer.step(batch(cfg))
    trainer.save(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_a_broken_checkpoint_is_one_message(tmp_path: Path) -> None:
    trainer = TorchTrainer(config())
    with pytest.raises(UserError, match="cannot read"):
        trainer.load(tmp_path)
    trainer.save(tmp_path)
    (tmp_path / "masters.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        trainer.load(tmp_path)


def test_a_checkpoint_with_more_or_less_than_the_model_is_refused(tmp_path: Path) -> None:
    """A model of fewer layers would otherwise go on with the first ones."""
    TorchTrainer(config()).save(tmp_path)
    layers = config().model.num_layers
    for changed, words in (
        (layers + 1, "is missing"),
        (layers - 1, r"weights that the model does not use: \d+ weights, first model"),
    ):
        cfg = config()
        cfg.model.num_layers = changed
        with pytest.raises(UserError, match=f"does not fit this model: .*{words}"):
            TorchTrainer(cfg).load(tmp_path)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", ["int4", "mxfp4", "nvfp4", "fp8"])
def test_export_decodes_to_what_the_trainer_computes_with(model: str, format: str) -> None:
    trainer = TorchTrainer(cfg := config(MODELS[model], format=format))
    trainer.step(batch(cfg))
    resident = trainer.model.state_dict()
    seen, quantized = set(), 0
    layout = trainer._rollout_layout
    pieces = {piece.name: (name, piece) for name, rows in layout.pieces.items() for piece in rows}
    for exported in trainer.export():
        name, piece = pieces[exported.name]
        seen.add(exported.name)
        assert exported.format == layout.formats[name].format
        if layout.formats[name].quantized:
            quantized += 1
            assert torch.equal(decode(exported, layout.formats[name]), piece.of(resident[name])), exported.name
        else:
            assert torch.equal(exported.parts[exported.name].to(resident[name].dtype), piece.of(resident[name])), exported.name
    assert seen == {parameter.name for parameter in trainer.family.parameters(cfg.model)}
    assert quantized > 0


def test_exported_tensors_are_copies() -> None:
    trainer = TorchTrainer(cfg := config())
    parts = {name: part for exported in trainer.export() for name, part in exported.parts.items()}
    before = {name: part.clone() for name, part in parts.items()}
    trainer.step(batch(cfg))
    _assert_equal(parts, before)


def test_master_logprobs_restore_the_quantized_weights() -> None:
    trainer = TorchTrainer(cfg := config())
    trainer.step(batch(cfg))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    data = batch(cfg, seed=5)
    quantized, master = trainer.logprobs(data), trainer.logprobs(data, weights="master")
    _assert_equal(before, trainer.model.state_dict())
    assert not torch.equal(torch.cat(quantized), torch.cat(master))
    forward = TorchTrainer(cfg2 := config(**{"precision.qat_placement": QatPlacement.forward}))
    forward.step(batch(cfg2))
    assert torch.equal(torch.cat(forward.logprobs(data, weights="master")), torch.cat(master))
    assert torch.equal(torch.cat(forward.logprobs(data)), torch.cat(quantized))


def test_old_logprobs_of_the_training_forward_are_exact() -> None:
    """What the single-update shortcut takes from the training forward equals a separate pass, bit for bit."""
    trainer = TorchTrainer(cfg := config(**{"router_replay.trainer": True}))
    data = batch(cfg, routes=True)
    separate = trainer.logprobs(data)
    taken = trainer.step(data).old_logprobs
    assert all(torch.equal(a, b) for a, b in zip(separate, taken, strict=True))


def test_several_updates_per_rollout() -> None:
    trainer = TorchTrainer(cfg := config(**{"algorithm.updates_per_rollout": 2}))
    separate = trainer.logprobs(data := batch(cfg))
    result = trainer.step(data)
    assert trainer.version == 2 and result.old_version == 0
    assert result.metrics["train/ppo_kl"] != 0
    assert all(torch.equal(a, b) for a, b in zip(separate, result.old_logprobs, strict=True))  # of before the first update


def test_logprobs_that_are_given_are_the_old_policys() -> None:
    trainer = TorchTrainer(cfg := config())
    data = batch(cfg)
    given = [row + 0.1 for row in trainer.logprobs(data)]
    result = trainer.step(replace(data, old_logprobs=given))
    assert result.old_logprobs is given and result.metrics["train/ppo_kl"] == pytest.approx(0.1, abs=1e-5)


def test_nan_steps_are_skipped_counted_and_end_the_run() -> None:
    trainer = TorchTrainer(cfg := config())
    good, bad = batch(cfg), batch(cfg)
    bad.advantages[0][1] = float("nan")
    trainer.step(good)
    before = _masters(trainer)
    for _ in range(2):
        assert trainer.step(bad).metrics["train/nan_steps"] == 1
    _assert_equal(before, trainer.optimizer.masters)
    assert trainer.version == 1
    assert trainer.step(good).metrics["train/nan_steps"] == 0
    trainer.step(bad)
    trainer.step(bad)
    with pytest.raises(UserError, match="3 optimizer steps in a row.*loss"):
        trainer.step(bad)


def test_kl_term_pulls_towards_the_reference() -> None:
    cfg = config(**{"algorithm.kl_coef": 0.5})
    trainer, data = TorchTrainer(cfg), batch(cfg)
    at_start = trainer.step(data).metrics["train/kl_loss"]
    later = trainer.step(batch(cfg, seed=1)).metrics["train/kl_loss"]
    assert later > at_start >= 0  # at the start only quantization separates the two
    assert data.ref_logprobs is None
    with pytest.raises(UserError, match="no reference"):
        TorchTrainer(config()).reference_logprobs(data)


def test_sft_learns_and_the_optimizer_can_be_reset() -> None:
    trainer = TorchTrainer(config())
    pairs = [(torch.tensor([5, 6, 7, 8, 9, 10]), 2), (torch.tensor([5, 6, 9, 11]), 2)]
    losses = [trainer.sft_step(pairs, lr=1e-2)["sft/loss"] for _ in range(30)]
    assert losses[-1] < losses[0] / 4
    assert float(trainer.optimizer.state_tensors()["step"][0]) == 30
    trainer.reset_optimizer()
    assert float(trainer.optimizer.state_tensors()["step"][0]) == 0


def test_learning_rate_schedules() -> None:
    from runner.trainer.optimizer import learning_rate

    optimizer = config().trainer.optimizer
    optimizer.lr, optimizer.lr_warmup_steps, optimizer.lr_min_ratio = 1.0, 4, 0.1
    optimizer.lr_schedule = LrSchedule.linear
    assert [learning_rate(optimizer, step, 14) for step in (0, 3, 4, 9, 14, 99)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    optimizer.lr_schedule = LrSchedule.cosine
    assert learning_rate(optimizer, 9, 14) == pytest.approx(0.55)
    for optimizer.lr_schedule in (LrSchedule.linear, LrSchedule.cosine):  # a plan that ends in its warm-up goes no further up
        assert [learning_rate(optimizer, step, 2) for step in (0, 1, 2, 3, 4, 99)] == pytest.approx([0.25, 0.5, *[0.1] * 4])
        assert learning_rate(optimizer, 4, 4) == 0.1
        optimizer.lr_min_ratio = 0.8
        assert [learning_rate(optimizer, step, 2) for step in (1, 2, 99)] == pytest.approx([0.5, 0.5, 0.5])
        optimizer.lr_min_ratio = 0.1
    optimizer.lr_schedule = LrSchedule.constant
    assert [learning_rate(optimizer, step, 2) for step in (0, 1, 2, 3, 4, 99)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_run_that_ends_in_its_warmup_is_told_so_and_not_refused() -> None:
    from runner.trainer.optimizer import unfinished_warmup

    (text,) = unfinished_warmup(config(**{"steps": 3, "trainer.optimizer.lr_warmup_steps": 10}))
    assert "10 updates and the run has 3" in text
    assert unfinished_warmup(config(**{"steps": 10, "trainer.optimizer.lr_warmup_steps": 10})) == []
    changes = {"steps": 12, "trainer.optimizer.lr_warmup_steps": 10, "trainer.optimizer.lr_decay_steps": 4}
    falling = {"trainer.optimizer.lr_schedule": "linear", "trainer.optimizer.lr_min_ratio": 0.0}
    (text,) = unfinished_warmup(config(**changes, **falling))
    assert "10 updates and its plan has 4; from then on it is 0" in text
    assert unfinished_warmup(config(**changes, **{"trainer.optimizer.lr_schedule": "constant"})) == []
    assert rules.check(composed(**{"steps": 3, "trainer.optimizer.lr_warmup_steps": 10})) == []


@pytest.mark.parametrize("architecture", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("format", ["int4", "mxfp4", "nvfp4", "fp8"])
def test_export_equals_encoding_every_weight_by_itself(format: str, architecture: dict[str, Any]) -> None:
    """Same integers and scales from stored scales, from a stack, and from bf16(master) alone."""
    from runner.precision.codec import encode_all
    from runner.precision.plan import PrecisionPlan

    trainer = TorchTrainer(cfg := config(architecture, format=format))
    trainer.step(batch(cfg))
    masters = list(trainer.export("bf16"))
    assert {exported.format for exported in masters} == {"bf16"}
    weights = ((exported.name, exported.parts[exported.name]) for exported in masters)
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    plain = {exported.name: exported for exported in encode_all(weights, plan)}
    for exported in trainer.export():
        expected = plain[exported.name]
        assert exported.format == expected.format
        assert {name: part.dtype for name, part in exported.parts.items()} == {n: p.dtype for n, p in expected.parts.items()}
        _assert_equal(_bytes(exported.parts), _bytes(expected.parts))


def _bytes(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part.contiguous().view(torch.uint8) for name, part in parts.items()}


def test_a_checkpoint_of_an_earlier_version_loads(tmp_path: Path) -> None:
    """Files and names as they were when they were first written, by hand; what is saved again has the same ones."""
    trainer = TorchTrainer(config())
    masters = {name: torch.randn_like(master) for name, master in trainer.optimizer.masters.items()}
    moments = {f"{moment}/{name}": torch.rand_like(row) for moment in ("exp_avg", "exp_avg_sq") for name, row in masters.items()}
    optimizer = {"step": torch.tensor([3.0, 3.0]), "rng": torch.get_rng_state(), **moments}
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    save_file(masters, before / "masters.safetensors")
    save_file(optimizer, before / "optimizer.safetensors")
    counters = {"format": 1, "version": 5, "schedule_step": 3, "nan_in_a_row": 1, "nan_total": 2, "master_weights": True}
    (before / "trainer.json").write_text(json.dumps(counters))
    trainer.load(before)
    assert trainer.version == 5
    _assert_equal(masters, trainer.optimizer.masters)
    trainer.save(after)
    assert json.loads((after / "trainer.json").read_text()) == counters
    for name, tensors in (("masters", masters), ("optimizer", optimizer)):
        _assert_equal(tensors, load_file(after / f"{name}.safetensors"))
    weights = load_file(after / "model.safetensors")
    assert weights.keys() == {parameter.name for parameter in trainer.family.parameters(trainer.cfg.model)}
