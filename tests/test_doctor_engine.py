"""`doctor engine`: the in-process engine computes with the plan's weights, and engines that do not are caught."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from runner.config.compose import load
from runner.config.schema import Convention, Role
from runner.data import ExportedTensor
from runner.doctor import engine
from runner.doctor.engine import check_weight, probed_formats, probed_weights, recovered_findings, run_findings
from runner.errors import UserError
from runner.findings import Status
from runner.precision.codec import decode
from runner.precision.plan import PrecisionPlan
from runner.precision.tensor_format import TensorFormat
from runner.rollout.local.probe import LocalProbe

NAME = "model.layers.0.mlp.experts.0.up_proj.weight"
FORMATS = probed_formats()


@pytest.fixture(scope="module")
def probe() -> LocalProbe:
    return LocalProbe(load([]).config)


@pytest.mark.parametrize("tensor_format", FORMATS, ids=str)
def test_local_kernels_compute_with_the_plans_weights(probe: LocalProbe, tensor_format: TensorFormat) -> None:
    finding = check_weight(probe, Role.routed_expert, NAME, (64, 256), tensor_format)
    assert finding.status is Status.ok, finding.found


def test_products_are_exact_under_exact_and_not_under_the_others(probe: LocalProbe) -> None:
    text = {c: check_weight(probe, Role.routed_expert, NAME, (64, 256), TensorFormat.int4(32, c)).found for c in Convention}
    assert "every product exact in bf16" in text[Convention.exact]
    for convention in (Convention.kimi, Convention.llmcompressor):
        assert "fp32 products, as declared" in text[convention]


def test_every_role_and_shape_of_a_model_is_probed() -> None:
    weights = probed_weights(load(["model=tiny_mla"]).config.model)
    roles = {role for role, _, _ in weights}
    assert {Role.attention, Role.routed_expert, Role.shared_expert, Role.dense_mlp} <= roles
    assert not roles & {Role.router, Role.embedding, Role.lm_head, Role.norm}


class PlantedKernel:
    """A kernel over the effective weight, changed by `spoil`."""

    kind = "planted"

    def __init__(self, weight: torch.Tensor, rounding: str) -> None:
        self.weight, self.product_rounding = weight, rounding

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight.T.float()).to(torch.bfloat16)


class PlantedProbe:
    name = "planted"
    device = torch.device("cpu")

    def __init__(self, spoil: Callable[[torch.Tensor], torch.Tensor], rounding: str = "bf16") -> None:
        self.spoil, self.rounding = spoil, rounding

    def kernel(self, exported: ExportedTensor, shape: tuple[int, int], tensor_format: TensorFormat) -> PlantedKernel:
        return PlantedKernel(self.spoil(decode(exported, tensor_format)), self.rounding)

    def pool(self, cfg: object) -> None:
        return None


def one_bit(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.clone()
    changed.view(torch.int16)[5, 7] ^= 1
    return changed


def shifted(weight: torch.Tensor) -> torch.Tensor:
    return weight.roll(1, dims=1)


@pytest.mark.parametrize("spoil", [one_bit, shifted, torch.neg, torch.zeros_like], ids=lambda f: f.__name__)
@pytest.mark.parametrize("tensor_format", [FORMATS[0], FORMATS[1], FORMATS[-1]], ids=str)
def test_wrong_weights_are_found_and_named(spoil: Callable[[torch.Tensor], torch.Tensor], tensor_format: TensorFormat) -> None:
    assert check_weight(PlantedProbe(lambda w: w), Role.routed_expert, NAME, (32, 64), tensor_format).status is Status.ok
    finding = check_weight(PlantedProbe(spoil), Role.routed_expert, NAME, (32, 64), tensor_format)
    assert finding.status is Status.fail and NAME in finding.found and "the plan says" in finding.found


def test_one_wrong_bit_is_located() -> None:
    finding = check_weight(PlantedProbe(one_bit), Role.routed_expert, NAME, (32, 64), FORMATS[0])
    assert "1 of 2048 weights differ" in finding.found and "[5, 7] is" in finding.found


def test_a_wrongly_declared_rounding_is_found() -> None:
    kimi = TensorFormat.int4(32, Convention.kimi)
    assert check_weight(PlantedProbe(lambda w: w, "bf16"), Role.routed_expert, NAME, (64, 256), kimi).status is Status.ok
    finding = check_weight(PlantedProbe(lambda w: w, "fp32"), Role.routed_expert, NAME, (64, 256), kimi)
    assert finding.status is Status.fail and "rounded to bf16, the engine declares fp32" in finding.found


def test_an_accumulator_in_bf16_with_lost_bits_is_found() -> None:
    """One-hot inputs cannot see it: with a single product there is nothing to accumulate."""

    class Coarse(PlantedKernel):
        def linear(self, x: torch.Tensor) -> torch.Tensor:
            out = super().linear(x)
            several = (x != 0).sum(1, keepdim=True) > 1
            coarse = (out.view(torch.int16) & ~1).view(torch.bfloat16)
            return torch.where(several, coarse, out)

    class CoarseProbe(PlantedProbe):
        def kernel(self, exported: ExportedTensor, shape: tuple[int, int], tensor_format: TensorFormat) -> PlantedKernel:
            return Coarse(decode(exported, tensor_format), "bf16")

    finding = check_weight(CoarseProbe(lambda w: w), Role.routed_expert, NAME, (32, 64), FORMATS[1])
    assert finding.status is Status.fail and "explained by neither" in finding.found


@pytest.mark.parametrize(
    "overrides",
    [[], ["model=tiny_mla"], ["model=tiny_dense", "precision=fp8_rollout"], ["precision=nvfp4_qat"]],
    ids=lambda o: "+".join(o) or "default",
)
def test_the_whole_engine_holds_the_plans_weights(overrides: list[str]) -> None:
    cfg = load(overrides).config
    findings = list(run_findings(cfg, LocalProbe(cfg)))
    assert [f for f in findings if f.status is not Status.ok] == []
    quantized = PrecisionPlan.build(cfg.model, cfg.precision, "rollout").quantized
    told = [f.found for f in findings if f.name.startswith("engine:") and "bf16" not in f.name]
    assert sum(int(text.split(" weights recovered, equal bit for bit")[0]) for text in told) == len(quantized) > 0


def test_swapped_experts_are_found_by_name() -> None:
    cfg = load([]).config
    pool = LocalProbe(cfg).pool(cfg)
    assert pool is not None
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    pool.update_weights(0, engine.random_stream(plan))
    first, second = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (2, 3))

    class Swapped:
        def effective_weight(self, name: str) -> torch.Tensor:
            return pool.effective_weight({first: second, second: first}.get(name, name))

    wrong = [f for f in recovered_findings(Swapped(), plan) if f.status is Status.fail]
    assert len(wrong) == 1 and "2 of 96 weights" in wrong[0].found and first in wrong[0].found and second in wrong[0].found
    pool.close()


def test_command_and_its_errors() -> None:
    out = io.StringIO()
    cfg = load([]).config
    assert engine.check_engine(cfg, Console(file=out, width=200, color_system=None)) == 0
    assert "recovered through its kernels (tiny_moe)" in out.getvalue() and "checks passed" in out.getvalue()
    cfg = load(["rollout=sglang", "speculative=none"]).config
    with pytest.raises(UserError, match="rollout=sglang has no probe yet"):
        engine.check_engine(cfg, Console())
