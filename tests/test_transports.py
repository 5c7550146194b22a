"""A transport is one object: rules, planner, preflight and pool see that of docs/extending.md."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runner.config import compose, preflight
from runner.config.schema import Config
from runner.errors import UserErrors
from runner.models import family_of
from runner.planner.parameters import take_inventory
from runner.planner.traffic import sync_flows
from runner.precision.plan import PrecisionPlan
from runner.rollout.sglang import arguments
from runner.weights.transports import TRANSPORTS, Rank, Transport
from tests.extending import module


@pytest.fixture
def pigeon() -> Iterator[Transport]:
    made = module("runner/weights/transports/pigeon.py").Pigeon()
    TRANSPORTS[made.name] = made
    yield made
    del TRANSPORTS[made.name]


def load(*overrides: str) -> Config:
    return compose.load_config(["rollout=sglang", "model=tiny_dense", "router_replay=none", "precision=bf16", *overrides])


def test_the_config_names_it_and_rules_planner_and_preflight_ask_it(pigeon: Transport) -> None:
    cfg = load("rollout.weight_transport=pigeon", "cluster.interface=lo")
    flows = {flow.what: flow for flow in sync_flows(cfg, take_inventory(cfg))}
    assert flows["weight sync, pigeon (configured)"].how == "1 letters of seven times the weights"
    assert flows["weight sync, pigeon (configured)"].size == 7 * flows["weight sync, p2p"].size
    with pytest.raises(UserErrors, match="pigeons carry bf16"):
        load("rollout.weight_transport=pigeon", "precision=fp8_rollout")
    with pytest.raises(UserErrors, match="no pigeon loft"):
        preflight.check(cfg)
    assert "pigeons are slow" in arguments.warnings(cfg)


def test_a_transport_that_does_not_exist_is_refused_with_the_ones_that_do() -> None:
    with pytest.raises(UserErrors, match="'pigeon' is none of .*tensor") as caught:
        load("rollout.weight_transport=pigeon")
    assert "p2p" in str(caught.value)


class Server:
    """An SGLang server that never starts; only the address of the real one."""

    def __init__(self, index: int, arguments: dict[str, Any], **_: Any) -> None:
        self.index, self.arguments, self.url, self.log = index, arguments, "http://127.0.0.1:9", Path("log")

    def start(self) -> None: ...

    stop = kill = start

    def alive(self) -> bool:
        return True


def test_a_pool_brings_weights_by_it(pigeon: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's half in a real pool, the engine's half behind a client that only pretends."""
    pytest.importorskip("aiohttp", reason="make setup-sglang")
    from runner.cluster.launcher import EngineOrder
    from runner.data import ExportedTensor
    from runner.models.build import build_model, disk_tensors, named_weights
    from runner.rollout.sglang import pool, server
    from runner.weights.stream import digest

    cfg = load("rollout.weight_transport=tensor")
    arrived: dict[str, str] = {}

    class Client:
        def __init__(self, *_: Any) -> None: ...

        async def ready(self) -> bool:
            return True

        async def plugin(self, action: str, **request: Any) -> dict[str, Any]:
            if action == "load":
                rank = Rank("127.0.0.1", torch.device("cpu"), 0, None, False)
                received = TRANSPORTS[request["transport"]].receive(request["offer"], rank, lambda name: True)
                arrived.update((name, digest(tensor)) for name, tensor in received)
            about = {"formats": {}, "device": "cpu", "attention_backend": "none"}
            return {"problems": [], "arrived": len(request.get("digests", [])), "checked": len(request.get("parts", [])), **about}

        def __getattr__(self, name: str) -> Any:
            async def done(*_: Any) -> None: ...

            return done

    def served(_: object, order: EngineOrder, device: int | None) -> Server:
        made = Server(order.index, order.arguments)
        made.client = lambda *_: Client()  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(server.Site, "server", served)
    made = pool.SglangPool(cfg, transport=pigeon)
    built = build_model(cfg.model, dtype=torch.float32, seed=1)
    tensors = disk_tensors(family_of(cfg.model), cfg.model, named_weights(cfg.model, built))
    items = [ExportedTensor(name, "bf16", {name: tensor.detach().clone()}) for name, tensor in tensors]
    root = made.driver.writer.root
    try:
        report = made.update_weights(0, iter(items))
        assert report.problems == [] and report.arrived == len(PrecisionPlan.build(cfg.model, cfg.precision, "rollout").tensors)
        assert arrived == {name: digest(part) for item in items for name, part in item.parts.items()} and root.is_dir()
    finally:
        made.close()
    assert not root.exists()


def test_transports_import_no_torch() -> None:
    """Tab completion, rules and planner ask them."""
    code = "import sys; from runner.weights.transports import TRANSPORTS; assert TRANSPORTS and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
