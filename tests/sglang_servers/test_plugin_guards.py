"""The CPU twin is for CPUs: its parts refuse to load where CUDA is present. Starts no server."""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.sglang


@pytest.mark.promise("the CPU's parts refuse to load beside CUDA")
@pytest.mark.parametrize("part", ["cpu", "quantization"])
def test_the_twins_parts_refuse_to_load_beside_cuda(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang", reason="make setup-sglang")
    module = importlib.import_module(f"runner.rollout.sglang.plugin.{part}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="does not load where CUDA is present"):
        module.register()


def test_on_cuda_the_plugin_registers_what_every_device_needs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sglang", reason="make setup-sglang")
    from runner.rollout.sglang import plugin
    from runner.rollout.sglang.plugin import common, cpu, quantization, weights

    called = []
    for module in (common, cpu, quantization, weights):
        monkeypatch.setattr(module, "register", lambda name=module.__name__: called.append(name.rpartition(".")[2]))
    monkeypatch.setenv("RUNNER_SGLANG_SERVER", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plugin.register()
    assert called == ["common", "weights"]


def test_every_batch_has_a_seed_per_request() -> None:
    """A score or SGLang's health check samples nothing and names no seed; merged with samples it must not leave fewer seeds."""
    pytest.importorskip("sglang", reason="make setup-sglang")
    from types import SimpleNamespace

    from runner.rollout.sglang.plugin import common

    for seeds in ([7, 2**62], [None], [5, None]):
        requests = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=seed)) for seed in seeds]
        info = SimpleNamespace()
        common._seeds(info, None, SimpleNamespace(reqs=requests, device="cpu"))
        assert info.sampling_seed.tolist() == [seed or 0 for seed in seeds]
