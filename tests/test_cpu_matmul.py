"""bf16 matmuls on a CPU: native and widened, both forced, whatever this machine would choose."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from runner.config.schema import CpuMatmul
from runner.precision import cpu_matmul

WAYS = [CpuMatmul.native, CpuMatmul.widened]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = CpuMatmul.widened if cpu_matmul.widened() else CpuMatmul.native
    yield
    cpu_matmul.install(before)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


A, B, C = bf16(48, 40), bf16(40, 24, seed=1), bf16(48, 24, seed=2)
AA, BB, CC = bf16(3, 16, 40), bf16(3, 40, 24, seed=1), bf16(3, 16, 24, seed=2)
ENDS = torch.tensor([16, 16, 48], dtype=torch.int32)
CALLS = {
    "mm": (lambda f: f(A) @ f(B)),
    "mm out": (lambda f: torch.mm(f(A), f(B), out=torch.empty(0, dtype=f(A).dtype))),
    "strided": (lambda f: f(A).t()[:, ::2] @ f(A)[::2]),
    "addmm": (lambda f: torch.addmm(f(C), f(A), f(B), beta=0.5, alpha=2)),
    "addmm out": (lambda f: torch.addmm(f(C), f(A), f(B), out=torch.empty_like(f(C)))),
    "addmm in place": (lambda f: f(C).clone().addmm_(f(A), f(B), alpha=3)),
    "bmm": (lambda f: torch.bmm(f(AA), f(BB))),
    "bmm out": (lambda f: torch.bmm(f(AA), f(BB), out=torch.empty_like(f(CC)))),
    "baddbmm": (lambda f: torch.baddbmm(f(CC), f(AA), f(BB), alpha=0.5)),
    "baddbmm in place": (lambda f: f(CC).clone().baddbmm_(f(AA), f(BB))),
    "linear": (lambda f: F.linear(f(AA), f(B).t())),
    "linear with bias": (lambda f: F.linear(f(AA), f(B).t(), f(C)[0])),
    "grouped": (lambda f: F.grouped_mm(f(A), f(BB), offs=ENDS)),
    "matmul of four dimensions": (lambda f: f(AA)[None] @ f(BB)[None]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_widened_rounds_the_fp32_result_once(call) -> None:  # type: ignore[no-untyped-def]
    cpu_matmul.install(CpuMatmul.native)
    expected = call(torch.Tensor.float).to(torch.bfloat16)
    exact = call(torch.Tensor.float if call is CALLS["grouped"] else torch.Tensor.double).double()  # torch groups no doubles
    native = call(lambda t: t)
    assert cpu_matmul.install(CpuMatmul.widened)[0] is CpuMatmul.widened
    found = call(lambda t: t)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
    # half a unit of bf16's 8 bits for the one rounding, and what fp32 additions lose
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(native.double(), exact, rtol=2**-7, atol=2e-2)
    cpu_matmul.install(CpuMatmul.native)
    assert torch.equal(call(lambda t: t), native)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.complex64])
def test_other_dtypes_keep_torchs_own_kernels(way: CpuMatmul, dtype: torch.dtype) -> None:
    a, b = (A.float() * 4).to(dtype), (B.float() * 4).to(dtype)
    cpu_matmul.install(CpuMatmul.native)
    expected = a @ b
    cpu_matmul.install(way)
    assert torch.equal(a @ b, expected)


def test_operands_of_two_dtypes_are_refused_as_before() -> None:
    cpu_matmul.install(CpuMatmul.widened)
    with pytest.raises(RuntimeError, match="dtype"):
        A @ B.float()
    with pytest.raises(RuntimeError, match="shapes"):
        A @ C


def test_gradients_are_widened_too() -> None:
    """Linear and grouped matmul: the backward's products are those of fp32, each rounded once."""
    cpu_matmul.install(CpuMatmul.widened)
    x, w, g = A.clone().requires_grad_(), B.t().contiguous().requires_grad_(), C
    F.linear(x, w).backward(g)
    assert x.grad is not None and w.grad is not None
    assert torch.equal(x.grad, (g.float() @ w.detach().float()).to(torch.bfloat16))
    assert torch.equal(w.grad, (g.float().t() @ x.detach().float()).to(torch.bfloat16))
    rows, weights = A.clone().requires_grad_(), BB.clone().requires_grad_()
    F.grouped_mm(rows, weights, offs=ENDS).backward(C)
    assert weights.grad is not None and rows.grad is not None
    assert torch.equal(weights.grad[2], (A[16:].float().t() @ C[16:].float()).to(torch.bfloat16))
    assert torch.equal(rows.grad[:16], (C[:16].float() @ BB[0].float().t()).to(torch.bfloat16))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.filterwarnings("ignore:TF32")
@torch.backends.mkldnn.flags(enabled=False)  # oneDNN is what has bf16 instructions: without it torch's own sums round in between
def test_convolutions_and_their_gradients_are_widened(biased: bool) -> None:
    """As a vision tower cuts its patches (kernel and stride alike), and as one that overlaps and pads: rounded once."""
    for shape, kernel, stride, padding in (((6, 3, 2, 8, 8), (2, 4, 4), (2, 4, 4), 0), ((2, 3, 9, 9), (3, 3), 2, 1)):
        module = torch.nn.Conv3d if len(kernel) == 3 else torch.nn.Conv2d
        layer = module(3, 16, kernel, stride=stride, padding=padding, bias=biased, dtype=torch.bfloat16)  # type: ignore[arg-type]
        exact = module(3, 16, kernel, stride=stride, padding=padding, bias=biased)  # type: ignore[arg-type]
        exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
        cpu_matmul.install(CpuMatmul.native)
        native = layer(bf16(*shape))
        cpu_matmul.install(CpuMatmul.widened)
        found, x, wide_x = [], bf16(*shape).requires_grad_(), bf16(*shape).float().requires_grad_()
        for module_, pixels in ((layer, x), (exact, wide_x)):
            out = module_(pixels)
            out.backward(bf16(*out.shape, seed=5).to(out.dtype))
            found.append([out, pixels.grad, *(value.grad for value in module_.parameters())])
        for one, other in zip(*found, strict=True):
            assert one.dtype is torch.bfloat16 and torch.equal(one, other.to(torch.bfloat16))
        torch.testing.assert_close(native, found[0][0], rtol=2**-6, atol=2e-2)
        cpu_matmul.install(CpuMatmul.native)
        assert torch.equal(layer(bf16(*shape)), native)


def test_nan_infinity_and_empty_operands() -> None:
    cpu_matmul.install(CpuMatmul.widened)
    bad = A.clone()
    bad[0, 0], bad[1, 1] = float("inf"), float("nan")
    out = bad @ B
    assert out[0].isinf().all() and out[1].isnan().all() and torch.equal(out[2:], (A @ B)[2:])
    assert (A[:0] @ B).shape == (0, 24) and torch.equal(A[:, :0] @ B[:0], torch.zeros(48, 24, dtype=torch.bfloat16))


def test_results_repeat_bit_for_bit() -> None:
    for way in WAYS:
        cpu_matmul.install(way)
        assert all(torch.equal(A @ B, A @ B) for _ in range(5))


# ---- the choice


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(cpu_matmul, "has_bf16_instructions", lambda has=has: has)
        for way in WAYS:
            assert cpu_matmul.choose(way)[0] is way
            assert cpu_matmul.environment(way) == {cpu_matmul.VARIABLE: way.name}


@pytest.mark.parametrize(
    ("instructions", "ratio", "expected"),
    [
        (True, 99.0, CpuMatmul.native),
        (False, 30.0, CpuMatmul.widened),
        (False, 1.2, CpuMatmul.native),
        (False, 0.4, CpuMatmul.native),
    ],
)
def test_auto_goes_by_instructions_then_by_measurement(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, ratio: float, expected: CpuMatmul
) -> None:
    monkeypatch.delenv(cpu_matmul.VARIABLE, raising=False)
    monkeypatch.setattr(cpu_matmul, "has_bf16_instructions", lambda: instructions)
    monkeypatch.setattr(cpu_matmul, "measure", lambda: ratio)
    way, reason = cpu_matmul.choose(CpuMatmul.auto)
    assert way is expected and ("instructions" in reason) == instructions


@pytest.mark.parametrize("way", WAYS)
def test_a_child_takes_the_way_of_its_parent(way: CpuMatmul) -> None:
    code = "from runner.precision import cpu_matmul as m; print(m.install(m.CpuMatmul.auto)[0].name)"
    environment = os.environ | cpu_matmul.environment(way)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == way.name, result.stderr


def test_the_measurement_compares_the_two_ways() -> None:
    cpu_matmul.measure.cache_clear()
    assert 0.01 < cpu_matmul.measure() < 1000
    cpu_matmul.install(CpuMatmul.widened)
    cpu_matmul.measure.cache_clear()
    assert 0.01 < cpu_matmul.measure() < 1000  # native means torch's own, also while it is replaced


# ---- the in-process engine, whose compiled layers call torch below its dispatcher


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 24), (48, 24), (33, 1100)])
def test_compiled_products(way: CpuMatmul, rows: int, columns: int) -> None:
    """Dense products of the engine: `rows` of a larger buffer, a weight of more outputs than are widened at one time."""
    from runner.rollout.local import cpu_kernels
    from runner.rollout.local.fused import _Weights, as_array

    cpu_matmul.install(way)
    x, weight = bf16(rows + 7, 40), bf16(columns, 40, seed=3)
    linear = torch.nn.Linear(40, columns, bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    weights = _Weights([linear])  # owns the handles in its table
    table, group, _ = weights.arguments()
    out = torch.full((rows + 7, columns), 7.0, dtype=torch.bfloat16)
    assert cpu_kernels.product(as_array(x), rows, table, group, as_array(out)) == 0
    expected = torch.mm(x[:rows], weight.t())
    torch.testing.assert_close(out[:rows], expected, rtol=2**-7, atol=2e-2 if way is CpuMatmul.native else 1e-5)
    assert bool((out[rows:] == 7.0).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 0, 32)])
def test_compiled_expert_products(way: CpuMatmul, sizes: tuple[int, ...]) -> None:
    from runner.rollout.local import cpu_kernels
    from runner.rollout.local.fused import _Weights, as_array

    cpu_matmul.install(way)
    stacked = bf16(3, 24, 40, seed=4)
    weights = _Weights([object()], stacked)
    table, group, whole = weights.arguments()
    out, first = torch.zeros(48, 24, dtype=torch.bfloat16), np.cumsum([0, *sizes[:-1]])
    failed = cpu_kernels.expert_products(as_array(A), first, np.array(sizes), table, whole, group, as_array(out))
    assert failed == 0
    for weight, start, size in zip(stacked, first, sizes, strict=True):
        expected = torch.mm(A[start : start + size], weight.t())
        found = out[start : start + size]
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2e-2 if way is CpuMatmul.native else 1e-5)
