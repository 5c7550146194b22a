"""FP8 training: what is quantized in forward and backward, and what reaches a GPU's FP8 matmul."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from runner.config import preflight
from runner.config.schema import Role
from runner.errors import UserError, UserErrors
from runner.precision import fp8, fp8_matmul
from runner.trainer.torch.trainer import TorchTrainer
from tests.trainer_configs import MOE, batch, config

# every dimension a multiple of 128
WIDE = {
    **MOE,
    "num_layers": 1,
    "hidden_size": 128,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 128,
    "expert_ffn_size": 128,
    "initializer_range": 0.03,
}
needs_hopper = pytest.mark.skipif(
    fp8_matmul.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None,
    reason="no Hopper GPU with CUDA 12.9",
)


def trainer(*, backward: bool = False, **changes: object) -> TorchTrainer:
    roles = [Role.attention, Role.routed_expert]
    return TorchTrainer(config(WIDE, format="fp8", **{"precision.fp8_backward": backward, "precision.roles": roles}, **changes))


def operands(rows: int, columns: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations of very different sizes [rows, columns], weights [outputs, columns] and an output gradient, in bf16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 3, rows).unsqueeze(1)
    w, grad = torch.randn(outputs, columns, generator=generator), torch.randn(rows, outputs, generator=generator) * 1e-3
    return x.bfloat16(), fp8.quantize_dequantize(w.bfloat16())[0], grad.bfloat16()


def one_by_128(x: torch.Tensor) -> torch.Tensor:
    """FP8 quantize-dequantize written out: every 128 neighbours of a row by their own amax / 448."""
    out = torch.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 128):
            group = x[row, start : start + 128].float()
            scale = group.abs().max() / 448
            out[row, start : start + 128] = ((group / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
    return out


@pytest.mark.parametrize("backward", [False, True])
def test_a_linear_quantizes_its_operands_and_with_fp8_backward_its_gradient(backward: bool) -> None:
    built = trainer(backward=backward)
    linear = built.model.model.layers[0].self_attn.q_proj
    x, w, grad = operands(24, 128, 256)
    with torch.no_grad():
        linear.weight.copy_(w)
    x.requires_grad_()
    y = linear(x)
    x_grad, w_grad = torch.autograd.grad(y, [x, linear.weight], grad)
    seen, back = one_by_128(x.detach()), one_by_128(grad) if backward else grad
    assert torch.equal(y, F.linear(seen, w))
    assert torch.equal(x_grad, back @ w)  # straight through the quantization of x
    assert torch.equal(w_grad, back.t() @ seen)
    assert torch.equal(back, grad) != backward  # the test's gradient does not lie on an FP8 grid


@pytest.mark.parametrize("backward", [False, True])
def test_experts_quantize_both_matmuls(backward: bool) -> None:
    built = trainer(backward=backward)
    module = built.model.model.layers[0].mlp.experts
    x, _, grad = operands(6, 128, 128)
    x.requires_grad_()
    chosen = torch.full((6, 1), 2)  # every token to expert 2
    output = module(x, chosen, torch.ones(6, 1, dtype=torch.bfloat16))
    gate_up_grad, w_down_grad = torch.autograd.grad(output, [module.gate_up_proj, module.down_proj], grad)

    def qdq_grad(g: torch.Tensor) -> torch.Tensor:
        return one_by_128(g) if backward else g

    seen = one_by_128(x.detach())
    gate, up = (part.requires_grad_() for part in (seen @ module.gate_up_proj[2].detach().t()).chunk(2, -1))
    hidden = module.act_fn(gate) * up
    seen_hidden = one_by_128(hidden.detach())
    down_grad = qdq_grad(grad)
    torch.testing.assert_close(w_down_grad[2], down_grad.t() @ seen_hidden, rtol=2e-2, atol=1e-6)
    hidden.backward(down_grad @ module.down_proj[2].detach())
    inner = qdq_grad(torch.cat([gate.grad, up.grad], -1))
    torch.testing.assert_close(gate_up_grad[2], inner.t() @ seen, rtol=2e-2, atol=1e-4)
    assert gate_up_grad[[0, 1, 3]].abs().max() == 0


def test_fp8_backward_changes_gradients_and_nothing_in_the_forward() -> None:
    results = []
    for backward in (False, True):
        built = trainer(backward=backward)
        data = batch(built.cfg)
        results.append((torch.cat(built.logprobs(data)), built.step(data).metrics["train/grad_norm"]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] != results[1][1]


# -- scaled_mm: layouts, padding and the wiring, on any machine ---------------------------------------------------------------


def contract(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    """What torch.nn.functional.scaled_mm checks for 1 x 128 by 128 x 128 (its CUDA source), and the product it stands for:
    fp32 over the values that the scales in this layout mean, rounded once."""
    (rows, inner), (_, outputs) = a.shape, b.shape
    padded = math.ceil(inner / 512) * 4  # K / 128, rounded up to a multiple of 4
    assert a.dtype is b.dtype is torch.float8_e4m3fn and scale_a.dtype is scale_b.dtype is torch.float32
    assert a.is_contiguous() and b.t().is_contiguous()  # row-major by column-major
    assert inner % 16 == 0 and outputs % 16 == 0 and rows % 4 == 0
    assert scale_a.shape == (rows, inner // 128) and scale_a.stride(0) == 1
    assert scale_a.stride(1) == rows or scale_a.shape[1] == 1
    assert scale_b.shape == (padded, outputs // 128) and scale_b.stride(0) == 1
    assert scale_b.stride(1) == padded or scale_b.shape[1] == 1
    left = a.float() * scale_a.repeat_interleave(128, 1)
    right = b.float() * scale_b[: inner // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (left @ right).to(torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 128, 128), (5, 256, 384), (8, 640, 128), (0, 128, 256)], ids=str)
def test_layouts_and_padding_give_the_product_of_the_dequantized_operands(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(fp8_matmul, "_scaled_mm", contract)
    rows, inner, outputs = shape
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(rows, inner, generator=generator), torch.randn(outputs, inner, generator=generator).bfloat16()
    q, scale = fp8.quantize_activations(x.bfloat16())
    weight_q, weight_scale = fp8.quantize(w)
    out = fp8_matmul.matmul(q, scale, weight_q, weight_scale)
    left = fp8.dequantize_activations(q, scale, dtype=torch.float32)
    right = fp8.dequantize(weight_q, weight_scale, dtype=torch.float32)
    assert out.shape == (rows, outputs)
    torch.testing.assert_close(out, (left @ right.t()).to(torch.bfloat16), rtol=2**-7, atol=1e-3)
    back_q, back_scale = fp8_matmul.transposed(weight_q, weight_scale)
    assert torch.equal(fp8.dequantize(back_q, back_scale, dtype=torch.float32), right.t())


def one_by_one(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """What the kernel for experts computes (tests/test_fp8_grouped.py)."""
    left = fp8.dequantize_activations(q, scale, dtype=torch.float32)
    right = fp8.dequantize(weight_q, weight_scale, dtype=torch.float32)
    stops = ends.tolist()
    products = [left[start:stop] @ right[e].t() for e, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))]
    return torch.cat(products).to(torch.bfloat16)


def scaled_trainer(monkeypatch: pytest.MonkeyPatch, *, backward: bool) -> TorchTrainer:
    monkeypatch.setattr(fp8_matmul, "missing", lambda device: None)
    monkeypatch.setattr(fp8_matmul, "_scaled_mm", contract)
    monkeypatch.setattr(fp8_matmul, "_grouped", one_by_one)
    return trainer(backward=backward, **{"precision.fp8_matmul": "scaled_mm"})


@pytest.mark.parametrize("backward", [False, True])
def test_scaled_training_is_simulated_training_up_to_rounding(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    """The simulation rounds weights q * scale to bf16 (2^-9) before it multiplies; nothing else differs. So logprobs agree
    to bf16 noise and gradients to a percent."""
    calls, results = [], []
    for kind in ("simulated", "scaled_mm"):
        built = scaled_trainer(monkeypatch, backward=backward) if kind == "scaled_mm" else trainer(backward=backward)
        if kind == "scaled_mm":
            monkeypatch.setattr(fp8_matmul, "_scaled_mm", lambda *arguments: calls.append("linear") or contract(*arguments))
            monkeypatch.setattr(fp8_matmul, "_grouped", lambda *arguments: calls.append("experts") or one_by_one(*arguments))
        built.optimizer.step = lambda lr, norm: None  # type: ignore[method-assign]  # keep the gradients to look at
        data = batch(built.cfg)
        logprobs = torch.cat(built.logprobs(data))
        built.step(data)
        results.append((logprobs, built.optimizer._flat_grad.clone()))
    assert set(calls) == {"linear", "experts"}
    assert not torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0.05)
    difference = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
    assert difference < 0.1, difference


def test_scaled_weights_follow_the_optimizer_and_masters_are_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    built = scaled_trainer(monkeypatch, backward=False)
    linear = built.model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen = fp8.quantize_activations(x)

    def expected() -> torch.Tensor:
        return contract(*_laid_out(*seen, *fp8.quantize(built.optimizer.masters["model.layers.0.self_attn.q_proj.weight"])))

    first = linear(x).detach()
    assert torch.equal(first, expected())
    built.step(batch(built.cfg))
    with torch.no_grad():
        assert not torch.equal(linear(x), first)
        assert torch.equal(linear(x), expected())
        with built._master_weights():  # as logprobs(weights="master"): bf16(master), which has no FP8 form
            master = built.optimizer.masters["model.layers.0.self_attn.q_proj.weight"].bfloat16()
            assert torch.equal(linear(x), F.linear(fp8.quantize_dequantize_activations(x), master))
        assert torch.equal(linear(x), expected())


def _laid_out(
    q: torch.Tensor, scale: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return q, weight_q.t(), fp8_matmul.activation_scales(scale), fp8_matmul.weight_scales(weight_scale)


# -- what a machine without FP8 matmuls says ------------------------------------------------------------------------------


def test_a_device_without_fp8_matmuls_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="need a Hopper GPU, the trainer runs on cpu"):
        trainer(**{"precision.fp8_matmul": "scaled_mm"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "this GPU has 8.0" in str(fp8_matmul.missing(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for built_for, fits in ((None, False), ("12.8", False), ("12.9", True), ("13.0", True)):
        monkeypatch.setattr(torch.version, "cuda", built_for)
        assert (fp8_matmul.missing(torch.device("cuda")) is None) == fits


def test_rules_and_preflight_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.config import compose

    monkeypatch.setattr(preflight, "visible_gpus", lambda: 0)
    wide = ["model.hidden_size=128", "model.head_dim=128", "model.expert_ffn_size=128", "model.ffn_size=128"]
    good = compose.load(["precision=fp8", "precision.fp8_matmul=scaled_mm", *wide]).config
    assert good.precision.train.format == "fp8"
    with pytest.raises(UserErrors, match="this machine has none"):
        preflight.check(good)
    for overrides, words in (
        (["precision=bf16"], "needs FP8 training"),
        (["precision=fp8", "trainer.device=cpu"], "the trainer runs on the CPU"),
        (["precision=fp8", "precision.qat_placement=forward"], "in_place"),
        (["precision=fp8", "model.expert_ffn_size=192"], "multiples of 128"),
    ):
        with pytest.raises(UserErrors, match=words):
            compose.load(["precision.fp8_matmul=scaled_mm", *wide, *overrides])


# -- a GPU ------------------------------------------------------------------------------------------------------------------


@needs_hopper
@pytest.mark.parametrize("shape", [(64, 128, 128), (5, 256, 384), (300, 640, 256)], ids=str)
def test_scaled_mm_computes_what_the_contract_says(shape: tuple[int, int, int]) -> None:
    rows, inner, outputs = shape
    generator = torch.Generator().manual_seed(1)
    q, scale = fp8.quantize_activations(torch.randn(rows, inner, generator=generator).bfloat16())
    weight_q, weight_scale = fp8.quantize(torch.randn(outputs, inner, generator=generator).bfloat16())
    expected = fp8.dequantize_activations(q, scale, dtype=torch.float32) @ (
        fp8.dequantize(weight_q, weight_scale, dtype=torch.float32).t()
    )
    found = fp8_matmul.matmul(*(tensor.cuda() for tensor in (q, scale, weight_q, weight_scale)))
    torch.testing.assert_close(found.cpu().float(), expected, rtol=2**-6, atol=2e-2)


@needs_hopper
def test_scaled_training_on_the_gpu_is_simulated_training_up_to_rounding() -> None:
    results = []
    for kind in ("simulated", "scaled_mm"):
        built = trainer(backward=True, **{"precision.fp8_matmul": kind, "trainer.device": "cuda"})
        results.append(torch.cat(built.logprobs(batch(built.cfg))).cpu())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0.05)
