"""`doctor gpu`: its parts on a CPU, its refusal without a GPU, its report. What only a GPU shows is not shown here."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from runner.doctor import gpu
from runner.errors import UserError
from runner.findings import Finding, Status
from runner.precision import fp8, fp8_matmul, kernels
from tests.configs import composed

CPU = torch.device("cpu")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160, color_system=None)


def test_it_refuses_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds none here"):
        gpu.check_gpu(composed(), quiet())


def test_kernels_that_differ_in_one_bit_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    finding, other = gpu.kernel_bits(CPU)
    assert finding.status is other.status is Status.ok and finding.found.startswith("45 of 45 cases")
    assert other.found.startswith("3 of 3 cases")
    real = kernels.quantize_pack

    def wrong(weight: torch.Tensor, group: int, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        packed, scale = real(weight, group, *rest)  # type: ignore[arg-type]
        if group == 128:
            packed.view(-1)[5] ^= 1
        return packed, scale

    monkeypatch.setattr(kernels, "quantize_pack", wrong)
    finding, _ = gpu.kernel_bits(CPU)
    assert finding.status is Status.fail and "group 128" in finding.found and "36 of 45" in finding.found
    activations, calls = fp8.quantize_activations, itertools.count()

    def off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = activations(x)
        if next(calls) == 3:  # what the device gives for the second case
            q.view(torch.uint8).view(-1)[7] ^= 1
        return q, scale

    monkeypatch.setattr(fp8, "quantize_activations", off)
    _, other = gpu.kernel_bits(CPU)
    assert other.status is Status.fail and other.found.startswith("2 of 3")


def test_speeds_are_shares_of_a_copy() -> None:
    found = {finding.name: finding for finding in gpu.kernel_speed(CPU, shape=(2, 64, 256))}
    assert set(found) == {
        "INT4 quantize-dequantize",
        "INT4 quantize + pack",
        "INT4 unpack",
        "FP8 weights in place",
        "FP8 activations",
    }
    assert all("of copy" in finding.found for finding in found.values())


def test_the_engines_kernels_and_the_trainer() -> None:
    (finding,) = gpu.engine_kernels(CPU)
    assert finding.status is Status.ok, finding
    found = {finding.name: finding.status for finding in gpu.trainer_step(gpu.trainer_config("cpu"))}
    assert found == {"trainer step": Status.ok, "trainer sleep and wake": Status.ok}
    (finding,) = gpu.fp8_matmuls(CPU)
    assert "not asked" in finding.found


def test_fp8_matmuls_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for a GPU's, the second of which takes another expert's weights."""

    def product(q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
        left = fp8.dequantize_activations(q, scale, dtype=torch.float32)
        return (left @ fp8.dequantize(weight_q, weight_scale, dtype=torch.float32).T).bfloat16()

    def experts(last: int) -> Callable[..., torch.Tensor]:
        def grouped(
            q: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, ends: torch.Tensor
        ) -> torch.Tensor:
            assert ends.tolist() == [70, 70, 100]
            parts = product(q[:70], scale[:70], w[0], w_scale[0]), product(q[70:], scale[70:], w[last], w_scale[last])
            return torch.cat(parts)

        return grouped

    monkeypatch.setattr(fp8_matmul, "missing", lambda device: None)
    monkeypatch.setattr(fp8_matmul, "matmul", product)
    for last, grade in ((2, Status.ok), (1, Status.fail)):
        monkeypatch.setattr(fp8_matmul, "grouped", experts(last))
        assert [(finding.name, finding.status) for finding in gpu.fp8_matmuls(CPU)] == [
            ("FP8 matmul", Status.ok),
            ("FP8 matmul of experts", grade),
        ]


def test_the_server_configs_pass_the_rules() -> None:
    for precision in gpu.SERVED:
        cfg = gpu.server_config(precision)
        assert cfg.precision.name == precision and cfg.parallelism.rollout_gpus == 1


def test_a_part_that_breaks_is_a_line_of_the_report(tmp_path: Path) -> None:
    def fine() -> Iterator[Finding]:
        yield Finding("a", Status.ok, "x")

    def breaks() -> Iterator[Finding]:
        raise UserError("no kernels [sm_90] here")
        yield

    console = quiet()
    assert gpu.report({"a": fine, "b": breaks}, tmp_path, gpu.card(CPU), console) == 1
    content = json.loads(next(tmp_path.glob("doctor-gpu-*.json")).read_text())
    assert [line["status"] for line in content["findings"]] == ["ok", "FAIL"] and not content["passed"]
    assert content["findings"][1]["found"] == "no kernels [sm_90] here"
    assert content["card"] == "CPU" and content["torch"] == torch.__version__
    assert "no kernels [sm_90] here" in next(tmp_path.glob("doctor-gpu-*.txt")).read_text()
