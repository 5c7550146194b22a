"""Packed weights of the local engine: what it computes with, what a sync verifies, what is resident."""

from __future__ import annotations

import pytest
import torch
from test_local_engine import config, exported, make_pool, requests

from runner.config.schema import Convention
from runner.data import ExportedTensor
from runner.errors import UserError
from runner.models import family_of
from runner.models.build import build_model, named_weights
from runner.precision.codec import decode
from runner.precision.tensor_format import TensorFormat
from runner.rollout.audit import audit_pool
from runner.rollout.local import LocalPool
from runner.trainer import attention, experts
from runner.trainer.torch.fp8 import install_fp8_matmuls
from runner.trainer.torch.qat import WeightLayout, WeightQuantizer
from runner.weights.stream import SealedTensor, seal

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
PRECISIONS = ("int4_qat", "bf16", "fp8_rollout", "mxfp4_qat", "nvfp4_qat")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_effective_weights_are_the_exported_ones(precision: str) -> None:
    """One-hot inputs through the kernels: under `exact`, and in every format whose product is rounded to bf16, bits are equal."""
    cfg = config("model=tiny_moe", f"precision={precision}", "speculative=none")
    pool, _ = make_pool(cfg)
    _, items = exported(cfg)
    assert bool(pool.plan.quantized) == (precision != "bf16")
    for item in items:
        if len(pool.plan.parameters[item.name].shape) == 2:
            wanted = decode(item, pool.plan.format_of(item.name))
            assert torch.equal(pool.effective_weight(item.name), wanted), item.name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_start_of_a_run_reads_back_what_the_engine_computes_with(precision: str) -> None:
    """Formats come from the resident weights: one that was replaced behind the plan's back is named."""
    cfg = config("model=tiny_moe", f"precision={precision}", "speculative=none")
    pool, _ = make_pool(cfg)
    audit_pool(pool.plan, pool.describe())
    name = next(iter(pool.plan.quantized or pool.model.weights))
    held = pool.model.weights[name].format
    planted = TensorFormat.int4(32, Convention.exact) if precision != "int4_qat" else TensorFormat.bf16()
    pool.model.weights[name].format = planted
    with pytest.raises(UserError, match=f"other formats.*run {held.format}, engine {planted.format}"):
        audit_pool(pool.plan, pool.describe())


@pytest.mark.parametrize("grid", ["group 16", "precision.roles=[routed_expert,attention]"])
def test_other_int4_grids_and_roles(grid: str) -> None:
    cfg = config("model=tiny_moe", "precision=int4_qat", "speculative=none", *([] if grid == "group 16" else [grid]))
    if grid == "group 16":  # a rule refuses it before a run
        cfg.precision.rollout.group_size = 16
    pool, _ = make_pool(cfg)
    (described,) = pool.describe()
    info = described.info
    if grid == "group 16":  # outside the kernel's limits: named, and computed from the packed parts
        assert set(info["kernels"]) == {"transient"} and "group size 16" in info["int4_fallback"][0]
        assert described.product_rounding == "bf16"
    else:
        assert set(info["kernels"]) == {"int4_kernel"} and described.product_rounding == "fp32"
    for item in exported(cfg)[1]:
        if pool.plan.format_of(item.name).quantized:
            wanted = decode(item, pool.plan.format_of(item.name))
            assert torch.equal(pool.effective_weight(item.name), wanted), item.name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_logprobs_are_the_trainers_over_the_same_weights(precision: str) -> None:
    """Through the trainer's attention and experts functions: most tokens have the same logprob to the last bit."""
    cfg = config("model=tiny_moe", f"precision={precision}", "speculative=none")
    pool, built = make_pool(cfg)
    trainers = build_model(cfg.model, dtype=torch.bfloat16, seed=0, attention=attention.register(), experts=experts.register())
    trainers.load_state_dict(built.state_dict())
    if precision == "fp8_rollout":  # the engine's FP8 matmuls take FP8 activations, as the trainer's do under precision=fp8
        shapes = {name: tensor.shape for name, tensor in named_weights(cfg.model, trainers)}
        layout = WeightLayout(family_of(cfg.model), cfg.model, pool.plan, shapes)
        install_fp8_matmuls(trainers, layout, WeightQuantizer(layout), cfg.precision, torch.device("cpu"))
    differences = []
    for sample in pool.generate(requests(16)):
        with torch.no_grad():
            logprobs = trainers(sample.tokens[None]).logits[0].float().log_softmax(-1)[sample.prompt_length - 1 : -1]
        expected = logprobs.gather(-1, sample.response_tokens[:, None])[:, 0]
        differences.append((sample.rollout_logprobs - expected).abs())
    # another order of additions, and now and then another expert at a near-tie
    assert torch.cat(differences).median() < 1e-3 and torch.cat(differences).quantile(0.7) < 0.03


def test_no_dequantized_copy_is_resident() -> None:
    pool, _ = make_pool(config("model=tiny_moe", "precision=int4_qat", "speculative=none"))
    list(pool.generate(requests(4)))
    unique = {id(weight): weight for weight in pool.model.weights.values()}.values()
    for weight in unique:
        values = sum(weight.rows) * weight.columns
        assert sum(t.numel() * t.element_size() for t in weight.tensors.values()) == values // 2 + 4 * values // 32
    names = [name for name, _ in pool.model.module.named_parameters()]
    assert names and not any("experts" in name for name in names)


def flipped(tensor: torch.Tensor, place: int = 5, bit: int = 0) -> torch.Tensor:
    raw = tensor.clone().contiguous()
    raw.view(-1).view(torch.uint8)[place] ^= 1 << bit
    return raw


def corrupted(sealed: SealedTensor, part: str) -> SealedTensor:
    parts = dict(sealed.exported.parts)
    parts[part] = flipped(parts[part])
    return SealedTensor(ExportedTensor(sealed.exported.name, sealed.exported.format, parts), sealed.digests)


@pytest.mark.parametrize("name", [EXPERT, "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_bit_flipped_on_the_wire_is_named(name: str) -> None:
    cfg = config("model=tiny_moe", "precision=int4_qat", "speculative=none")
    pool, items = LocalPool(cfg), exported(cfg)[1]
    for part in next(item for item in items if item.name == name).parts:
        wire = [corrupted(s, part) if s.exported.name == name else s for s in seal(items)]
        report = pool.update_weights(0, iter(wire))
        assert len(report.problems) == 1 and part in report.problems[0] and pool.version == -1
    assert pool.update_weights(0, seal(items)).problems == [] and pool.version == 0  # the retry


@pytest.mark.parametrize("precision", ["int4_qat", "fp8_rollout", "bf16"])
@pytest.mark.parametrize("name", [EXPERT, "model.layers.2.self_attn.q_proj.weight"])
def test_a_bit_flipped_in_the_resident_weight_is_named(precision: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("model=tiny_moe", f"precision={precision}", "speculative=none")
    pool, items = LocalPool(cfg), exported(cfg)[1]
    load = pool.store._replace
    weight = pool.model.weights.get(name)

    def flip() -> None:
        tensor = pool.model.others[name] if weight is None else next(iter(weight.tensors.values()))
        with torch.inference_mode():
            tensor.view(-1).view(torch.uint8)[7] ^= 1

    def load_then_flip(target, *rest):
        load(target, *rest)
        if target is weight:
            flip()

    if weight is not None:
        monkeypatch.setattr(pool.store, "_replace", load_then_flip)
        report = pool.update_weights(0, iter(items))
        assert len(report.problems) == 1 and name in report.problems[0] and report.resident_checked == len(items)
        monkeypatch.undo()
    assert pool.update_weights(0, iter(items)).problems == []
    assert pool.check_resident(items) == []
    flip()  # and one that happens after the sync
    problems = pool.check_resident(items)
    assert len(problems) == 1 and name in problems[0]


def test_missing_unexpected_and_doubled_tensors_are_named() -> None:
    cfg = config("model=tiny_moe", "precision=int4_qat", "speculative=none")
    pool, items = LocalPool(cfg), exported(cfg)[1]
    stranger = ExportedTensor("model.layers.9.norm.weight", "bf16", {"model.layers.9.norm.weight": torch.zeros(2)})
    without = [item for item in items if item.name != EXPERT]
    wrong = ExportedTensor(items[0].name, "fp8", items[0].parts)
    for stream, words in (
        (without, [EXPERT, "did not arrive"]),
        ([*items, stranger], ["layers.9", "no such tensor"]),
        ([*items, items[3]], [items[3].name, "twice"]),
        ([wrong, *items[1:]], [wrong.name, "arrived as fp8"]),
    ):
        report = pool.update_weights(0, iter(stream))
        assert len(report.problems) == 1 and all(word in report.problems[0] for word in words)


def test_residency_rotates_and_changes_are_counted() -> None:
    cfg = config("model=tiny_moe", "precision=int4_qat", "speculative=none", "mismatch.residency_tensors=10")
    pool, items = LocalPool(cfg), exported(cfg)[1]
    first = pool.update_weights(0, iter(items))
    assert first.resident_checked == first.arrived == len(items) and first.changed_integers is None
    again = pool.update_weights(1, iter(items))
    assert 10 <= again.resident_checked < len(items) and (again.changed_integers, again.changed_scales) == (0.0, 0.0)
    quantized = [item for item in items if item.format == "int4"]
    total = sum(8 * item.parts[item.name.removesuffix("weight") + "weight_packed"].numel() for item in quantized)
    changed = []
    for item in items:
        if item.name == EXPERT:
            part = item.name + "_packed"
            item = ExportedTensor(item.name, item.format, item.parts | {part: flipped(item.parts[part])})
        changed.append(item)
    assert pool.update_weights(2, iter(changed)).changed_integers == pytest.approx(1 / total)


def test_weight_sync_flushes_cached_keys_and_values() -> None:
    cfg = config("model=tiny_moe", "precision=int4_qat", "speculative=none")
    pool, _ = make_pool(cfg)
    before = {s.prompt_id: s.tokens for s in pool.generate(requests(6))}
    assert pool.update_weights(1, iter(exported(cfg, seed=9)[1])).problems == []
    fresh = LocalPool(cfg)
    fresh.update_weights(1, iter(exported(cfg, seed=9)[1]))
    after = {s.prompt_id: s.tokens for s in pool.generate(requests(6))}
    assert all(torch.equal(s.tokens, after[s.prompt_id]) for s in fresh.generate(requests(6)))
    assert any(not torch.equal(before[key], after[key]) for key in after)
