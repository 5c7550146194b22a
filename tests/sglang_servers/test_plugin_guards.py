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


def test_what_a_row_keeps_stands_at_its_vocabulary_ids_whatever_other_rows_leave_out() -> None:
    pytest.importorskip("sglang", reason="make setup-sglang")
    from runner.rollout.sglang.plugin import common

    generator = torch.Generator().manual_seed(1)
    probs = (3 * torch.randn(64, 300, generator=generator)).softmax(-1)
    top_ks = torch.tensor([1 << 30, 1, 5, 1 << 30]).repeat(16)
    top_ps = torch.tensor([1.0, 1.0, 1.0, 0.5]).repeat(16)
    kept = common._kept(probs, top_ks, top_ps, None)
    assert torch.equal(kept[kept > 0], probs[kept > 0])
    assert torch.equal(kept[0::4], probs[0::4]) and torch.equal(kept[1::4].argmax(-1), probs[1::4].argmax(-1))
    assert (kept[1::4] > 0).sum(-1).eq(1).all() and (kept[2::4] > 0).sum(-1).eq(5).all()
    nucleus = kept[3::4]
    smallest = nucleus.masked_fill(nucleus == 0, 2).min(-1).values
    assert (nucleus.sum(-1) > 0.5).all() and (nucleus.sum(-1) - smallest <= 0.5 + 1e-6).all()
    assert (common._kept(probs, top_ks, top_ps, torch.full((64,), 0.9))[0] > 0).sum() < 5
