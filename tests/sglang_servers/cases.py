"""Models, requests and references that the tests of both rollout pools share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from runner.config import compose
from runner.config.choices import TransferProtocol
from runner.config.schema import Config
from runner.data import ExportedTensor, Request, Sample, SamplingParams
from runner.models import family_of
from runner.models.build import build_model, disk_tensors, named_weights
from runner.precision.codec import decode, encode
from runner.precision.plan import PrecisionPlan
from runner.weights.transfer_engine import obstacles
from runner.weights.transports import TRANSPORTS, Site, Transport

FP32 = ("precision.base_dtype=float32", "speculative=none", "rollout.max_concurrency=16")

P2P = pytest.param("p2p", marks=pytest.mark.skipif(bool(obstacles("tcp")), reason="; ".join(obstacles("tcp"))))
EVERY_TRANSPORT = ["tensor", "distributed", "disk_full", "disk_delta", P2P]


def config(rollout: str, *overrides: str) -> Config:
    """fp32 activations, so that two engines agree to 1e-4."""
    return compose.load_config([f"rollout={rollout}", *FP32, *overrides])


def exported(cfg: Config, seed: int = 1, spread: float = 3.0) -> tuple[torch.nn.Module, list[ExportedTensor]]:
    """(transformers model, its export). Weights are spread wider than a fresh start, so that logits are peaked; where a weight is
    quantized the model computes with the effective weights."""
    plan = PrecisionPlan.build(cfg.model, cfg.precision, "rollout")
    built = build_model(cfg.model, dtype=torch.float32, seed=seed)
    items = []
    with torch.no_grad():
        for name, tensor in named_weights(cfg.model, built):
            if tensor.dim() > 1:
                tensor.mul_(spread)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
        for name, tensor in disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, built)):
            tensor_format = plan.format_of(name)
            if tensor_format.quantized:
                items.append(encode(name, tensor.to(torch.bfloat16), tensor_format))
                tensor.copy_(decode(items[-1], tensor_format))
            else:
                items.append(ExportedTensor(name, "bf16", {name: tensor.detach().clone()}))
    return built, items


def requests(count: int, *, same_prompt: int = 1, routes: bool = True, **sampling: Any) -> list[Request]:
    """`count` requests; each prompt is used `same_prompt` times; prompt lengths differ."""
    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(2, 272, (5 + 3 * (i % 4),), generator=generator).tolist()) for i in range(count)]
    params = SamplingParams(**({"temperature": 1.0, "max_response_tokens": 12} | sampling))
    return [
        Request(
            f"p{i // same_prompt}", i % same_prompt, prompts[i // same_prompt], params, seed=77 * i + 3, capture_routes=routes
        )
        for i in range(count)
    ]


def by_key(samples: list[Sample]) -> dict[tuple[str, int], Sample]:
    found = {(sample.prompt_id, sample.sample_index): sample for sample in samples}
    assert len(found) == len(samples), "a sample came twice"
    return found


def reference_logprobs(built: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """[R] of transformers over the sample's own tokens. A failed sample has none, which would equal anything's."""
    assert sample.response_length > 0, f"{sample.status}: {sample.finish_reason}"
    with torch.no_grad():
        logits = built(sample.tokens[None]).logits[0].float() / temperature
    scored = logits.log_softmax(-1)[sample.prompt_length - 1 : -1]
    return scored.gather(-1, sample.response_tokens[:, None])[:, 0]


def flipped(item: ExportedTensor, part: str) -> ExportedTensor:
    """One low bit of one value differs; the original stays as it is."""
    parts = {name: tensor.clone() for name, tensor in item.parts.items()}
    parts[part].reshape(-1).view(torch.uint8)[5] ^= 1
    return ExportedTensor(item.name, item.format, parts)


class Switch(Transport):
    """A transport for pools that serve many tests: weights travel by the config's transport, and in `over` by another one.

    Drivers stay until the pool closes: an engine that is started again needs the set that it had."""

    name = "switch"

    def __init__(self, usual: str) -> None:
        self.transport = usual
        self.drivers: dict[str, Any] = {}
        self._turned = False

    def driver(self, site: Site) -> Switch:
        self._site = dataclasses.replace(site, transfer_protocol=TransferProtocol.tcp)
        return self

    @property
    def current(self) -> Any:
        if self.transport not in self.drivers:
            self.drivers[self.transport] = TRANSPORTS[self.transport].driver(self._site)
        return self.drivers[self.transport]

    @contextmanager
    def over(self, transport: str) -> Iterator[None]:
        before, self.transport, self._turned = self.transport, transport, True
        try:
            yield
        finally:
            self.transport, self._turned = before, True

    def write(self, version: int, stream: Any, previous: Any) -> Any:
        """The first set after a turn travels whole, as a pool's first does."""
        written = self.current.write(version, stream, None if self._turned else previous)
        self._turned = False
        return written

    async def carry(self, *given: Any) -> str:
        return str(await self.current.carry(*given))

    def close(self) -> None:
        for driver in self.drivers.values():
            driver.close()


def started(cfg: Config) -> Any:
    """A pool of servers whose transport tests may switch (`pool.driver.over`)."""
    from runner.rollout.sglang import SglangPool

    return SglangPool(cfg, transport=Switch(cfg.rollout.weight_transport))


def asked(pool: Any, action: str, weights: Any, names: list[str], **request: Any) -> Any:
    """The first engine's answer to a plugin action that needs these parts of a set."""
    from runner.rollout.sglang.engines import EngineUpdate

    update = EngineUpdate(pool._fleet.roster.engines[0])
    pool._loop.run(pool._fleet.versions.delivery.send(action, [update], weights, names, **request))
    return update


def assert_follows_over(pool: Any, cfg: Config, transport: str, *, tolerance: float) -> None:
    """Two updates with different weights, after each of which logprobs are those of transformers over them. (The second one
    is a real delta.)"""
    with pool.driver.over(transport):
        for version, seed in enumerate((1, 2)):
            built, items = exported(cfg, seed=seed)
            assert pool.update_weights(version, iter(items)).problems == []
            samples = list(pool.generate(requests(3)))
            assert len(samples) == 3
            for sample in samples:
                torch.testing.assert_close(sample.rollout_logprobs, reference_logprobs(built, sample), atol=tolerance, rtol=0)


class Running:
    """A pool, its config, and the weights that a test starts from."""

    def __init__(self, pool: Any, cfg: Config) -> None:
        self.pool, self.cfg = pool, cfg
        self.model, self.items = exported(cfg)

    def fresh(self, version: int = 0) -> torch.nn.Module:
        self.sync(self.items, version)
        return self.model

    def sync(self, items: list[ExportedTensor], version: int) -> None:
        report = self.pool.update_weights(version, iter(items))
        assert report.problems == []
