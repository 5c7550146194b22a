"""Servers take 10 to 40 seconds to start, so one pool of each kind serves all tests of a session.

A test leaves a pool with any weights; it brings its own with `fresh`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Running, config, started

from runner.rollout.local import LocalPool


@pytest.fixture(scope="session")
def sglang_fp32() -> Iterator[Running]:
    cfg = config("sglang", "model=tiny_moe", "precision=bf16")
    pool = started(cfg)
    yield Running(pool, cfg)
    pool.close()


@pytest.fixture(scope="session")
def sglang_int4() -> Iterator[Running]:
    roles = "precision.roles=[routed_expert,attention]"
    forward = "precision.qat_placement=forward"  # fp32 training has no masters to quantize from
    cfg = config("sglang", "model=tiny_moe", "precision=int4_qat", roles, forward)
    pool = started(cfg)
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
