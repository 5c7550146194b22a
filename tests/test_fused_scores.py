"""Fused logprobs and entropies against torch's: through Triton's interpreter on a CPU, for real wherever there is a GPU."""

from __future__ import annotations

import pytest
import torch

from runner.trainer import microbatch
from tests.interpreter import DEVICE, interpret, needs_triton, runs_here, starts_it


@needs_triton
@starts_it
def test_the_tests_below_pass_in_the_interpreter() -> None:
    interpret(__file__)


@needs_triton
@runs_here
@pytest.mark.parametrize("columns", [37, 4096, 9001])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kernel_gives_the_scores_and_gradients_of_torch(columns: int, entropy_grad: bool, temperature: float) -> None:
    from runner.trainer.fused_scores import FusedScores

    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(5, columns + 3, generator=generator) * 6).to(DEVICE)[:, :columns]  # rows apart from each other
    logits[1, 3] = 120.0  # one certain token: the others' exponentials vanish
    targets = torch.tensor([0, 3, 5, columns - 1, 7], device=DEVICE)
    weight, entropy_weight = torch.randn(2, 5, generator=generator).to(DEVICE)
    results = []
    for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        own = logits.detach().to(dtype).requires_grad_()
        if fused:
            logprobs, entropy = FusedScores.apply(own, targets, temperature, entropy_grad)
        else:
            logprobs, entropy = microbatch.whole_vocabulary(own / temperature, targets, entropy_grad)
        loss = (logprobs * weight).sum()
        if entropy_grad:
            loss = loss + (entropy * entropy_weight).sum()
        assert entropy.requires_grad == entropy_grad
        loss.backward()
        results.append((logprobs.detach(), entropy.detach(), own.grad))
    for true, eager, got in zip(*results, strict=True):
        assert true.abs().max() > 0.1
        worst = float((eager - true).abs().max())
        assert float((got - true).abs().max()) <= 4 * worst + 1e-4, worst  # 1e-4: some last bits of the largest logit


@needs_triton
@runs_here
def test_kernel_takes_no_rows_and_its_gradients_sum_to_nothing() -> None:
    from runner.trainer.fused_scores import FusedScores

    logits = torch.randn(3, 64, device=DEVICE, dtype=torch.float32).requires_grad_()
    empty = FusedScores.apply(logits[:0], torch.empty(0, dtype=torch.int64, device=DEVICE), 1.0, False)
    assert [len(scores) for scores in empty] == [0, 0]
    FusedScores.apply(logits, torch.tensor([1, 2, 3], device=DEVICE), 1.0, False)[0].sum().backward()
    assert logits.grad is not None and torch.allclose(logits.grad.sum(1), torch.zeros(3, device=DEVICE), atol=1e-5)


def test_they_are_refused_on_a_cpu() -> None:
    from runner.config.option import option_of
    from tests.configs import composed

    cfg = composed(**{"trainer.fused_scores": True, "trainer.device": "cpu"})
    (problem,) = [problem for rule in option_of(cfg.trainer).machine for problem in rule(cfg)]
    assert problem.key == "trainer.fused_scores" and "CPU" in problem.problem
