"""The in-process engine and a GPU, as far as a machine without one can tell: what it refuses there, and what it reads back.

A tensor on torch's meta device has no values, so whatever asks for one on the host raises: a step that ends has asked for none.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runner.config import compose, preflight
from runner.config.schema import Config
from runner.errors import UserErrors
from runner.precision.plan import PrecisionPlan
from runner.rollout.local import option
from runner.rollout.local.attention import KVCache
from runner.rollout.local.experts import EngineExperts
from runner.rollout.local.model import EngineModel
from runner.rollout.local.sampling import SAMPLE, distribution, draw, uniforms
from runner.rollout.local.weights import DenseWeight
from tests.configs import composed, problems

NO_VALUES = torch.device("meta")
ON_A_GPU = ("parallelism=h200x1", "rollout=local", "trainer=torch", "precision=bf16", "router_replay=none")


def decode(cfg: Config) -> tuple[EngineModel, torch.Tensor]:
    """A decode step of 6 rows, two of them with a draft token, and the tokens drawn after it."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    model = EngineModel(cfg.model, plan, torch.bfloat16, NO_VALUES)
    counts = np.array([1, 2, 1, 1, 2, 1])
    total = int(counts.sum())
    with torch.inference_mode():
        cache = KVCache(6, 32, torch.bfloat16, NO_VALUES)
        hidden = model.forward(cache, np.full(total, 5), np.arange(6) + 3, counts)
        dist = distribution(model.logits(hidden), np.full(total, 0.7), np.ones(total), np.full(total, -1))
        return model, draw(dist.weights, uniforms(np.arange(total), np.arange(total), SAMPLE))


@pytest.mark.parametrize("model", ["tiny_dense", "tiny_moe", "tiny_mla"])
def test_a_decode_step_asks_the_device_for_nothing(model: str) -> None:
    engine, drawn = decode(composed(f"model={model}", "precision=bf16", "speculative=none"))
    assert drawn.shape == (8,) and drawn.device == NO_VALUES
    assert bool(engine.experts) == (model != "tiny_dense")
    routes = engine.routes()
    assert routes is None or routes.shape[0] == 8


def test_experts_one_after_the_other_would_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    init = EngineExperts.__init__

    def one_by_one(self: EngineExperts, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.grouped = False

    monkeypatch.setattr(EngineExperts, "__init__", one_by_one)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        decode(composed("model=tiny_moe", "precision=bf16", "speculative=none"))


def silu_and_mul(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_grouped_experts_are_experts_one_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.randn(shape, generator=generator).bfloat16() * 0.1 for shape in ((5, 64, 48), (5, 48, 32))]
    weights = [
        [
            DenseWeight((str(e),), (stack.shape[1],), stack.shape[2], torch.bfloat16, torch.device("cpu"), stack[e])
            for e in range(5)
        ]
        for stack in stacks
    ]
    biases = (torch.randn(5, 64, generator=generator).bfloat16(), torch.randn(5, 48, generator=generator).bfloat16())
    experts = EngineExperts(weights[0], weights[1], silu_and_mul, (stacks[0], stacks[1]), biases)
    assert not experts.grouped  # a CPU waits for nobody, and keeps its bits
    hidden = torch.randn(12, 48, generator=generator).bfloat16()
    index = torch.rand(12, 5, generator=generator)[:, :4].argsort(-1)[:, :2]  # expert 4 has no rows
    shares = torch.rand(12, 2, generator=generator).bfloat16()
    expected = experts(hidden, index, shares)
    experts.grouped = True
    torch.testing.assert_close(experts(hidden, index, shares), expected, rtol=2e-2, atol=2e-3)


def test_models_above_a_size_are_refused_on_a_gpu() -> None:
    (error,) = (e for e in problems("model=qwen3_4b", *ON_A_GPU) if e.key == "rollout")
    assert "4.0 billion" in error.problem and "more than 1 billion" in error.problem and error.fix.startswith("rollout=sglang")
    for overrides in (
        ["model=qwen3_4b", *ON_A_GPU, "rollout.max_parameters_on_gpu=0"],
        ["model=qwen3_4b", *ON_A_GPU, "rollout.device=cpu"],
        ["model=tiny_moe", *ON_A_GPU],
        ["model=qwen3_vl_2b", *ON_A_GPU],  # sees images, which no other engine does
    ):
        compose.load(overrides)
    with pytest.raises(UserErrors, match="billion"):
        compose.load(["model=qwen3_4b", *ON_A_GPU, "parallelism=single", "rollout.device=cuda"])


def test_the_machine_may_say_that_it_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("model=qwen3_4b", *ON_A_GPU, "parallelism=single")
    found = []
    for gpus in (0, 1):
        monkeypatch.setattr(preflight, "visible_gpus", lambda gpus=gpus: gpus)
        found.append([error.key for error in option.size_on_this_gpu(cfg)])
    assert found == [[], ["rollout"]]
    assert not list(option.size_on_gpus(cfg))
