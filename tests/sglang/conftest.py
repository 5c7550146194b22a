"""Servers take 10 to 40 seconds to start, so one pool of each kind serves all tests of a session.

A test leaves a pool with any weights; it brings its own with `fresh`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import config, exported

from runner.rollout.local import LocalPool
from runner.samples import ExportedTensor
from runner.schema import Config


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


@pytest.fixture(scope="session")
def sglang_fp32() -> Iterator[Running]:
    from runner.rollout.sglang import SglangPool

    cfg = config("sglang", "model=tiny_moe", "precision=bf16")
    pool = SglangPool(cfg)
    yield Running(pool, cfg)
    pool.close()


@pytest.fixture(scope="session")
def sglang_int4() -> Iterator[Running]:
    from runner.rollout.sglang import SglangPool

    roles = "precision.roles=[routed_expert,attention]"
    forward = "precision.qat_placement=forward"  # fp32 training has no masters to quantize from
    cfg = config("sglang", "model=tiny_moe", "precision=int4_qat", roles, forward)
    pool = SglangPool(cfg)
    yield Running(pool, cfg)
    pool.close()


@pytest.fixture(scope="session")
def local_fp32() -> Running:
    cfg = config("local", "model=tiny_moe", "precision=bf16", "rollout.device=cpu")
    return Running(LocalPool(cfg), cfg)


@pytest.fixture(params=["local", pytest.param("sglang", marks=pytest.mark.sglang)])
def running(request: pytest.FixtureRequest) -> Running:
    """Either pool: the contract's tests run against both."""
    found: Running = request.getfixturevalue(f"{request.param}_fp32")
    return found
