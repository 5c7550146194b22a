"""math-verify in a process of its own: formulas compared as mathematics, within limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.data import Sample
from runner.tasks import grading
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import score
from runner.tasks.symbolic import Symbolic, _worth_asking, shared


@pytest.fixture(scope="module")
def symbolic() -> Symbolic:
    return Symbolic()


@pytest.mark.parametrize(
    ("given", "reference", "equal"),
    [
        ("\\sqrt{12}", "2\\sqrt{3}", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}", True),
        ("x+2", "x+1", False),
        ("\\frac{1}{0}", "2", False),
        ("", "2", False),
        ("\\frac{", "2", False),
        ("]\n[", "2", False),
        ("\ud800", "2", False),
    ],
)
def test_formulas_are_compared_as_mathematics(symbolic: Symbolic, given: str, reference: str, equal: bool) -> None:
    assert symbolic.equal(given, reference) is equal


@pytest.mark.parametrize(
    "given", ["9^{9^9}", "9^9^9", "2^{100000}", "100000!", "3!!", "\\sum_{k=1}^{100} k", "\\int_0^1 x dx", "1" * 500]
)
def test_towers_and_work_left_undone_are_not_even_asked(given: str) -> None:
    assert not _worth_asking(given, "2")
    assert given.startswith(("1", "2", "3", "9")) or _worth_asking(given, given)


def test_a_comparison_that_never_ends_counts_as_wrong_and_the_next_one_works(symbolic: Symbolic) -> None:
    symbolic.start()
    assert symbolic._ask("9^{9^9}", "2") is False
    assert symbolic._ask("\\frac{2}{4}", "0.5") is True
    process = symbolic._process
    assert process is not None
    process.kill()  # as the kernel does when it takes too much memory
    process.wait()
    assert symbolic._ask("\\frac{2}{4}", "0.5") is True
    symbolic.close()
    assert symbolic._process is None


def test_model_text_is_never_run(symbolic: Symbolic, tmp_path: Path) -> None:
    target = tmp_path / "made"
    for text in (f"__import__('pathlib').Path('{target}').touch()", f"\\text{{open('{target}', 'w')}}", "exit()", "lambda: 0"):
        assert symbolic._ask(text, "2") is False
        assert symbolic._ask("1+1", "2") is True
    assert not target.exists()


def test_rewards_compare_formulas_from_their_own_thread() -> None:
    class Task:
        name = "maths"

        def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
            return float(grading.same_answer(text, prompt.answer))

    prompts = [Prompt(str(i), "", (), "2\\sqrt{3}") for i in range(4)]
    texts = ["\\sqrt{12}", "\\sqrt{13}", "2 \\cdot \\sqrt 3", "9^{9^9}"]
    shared.start()
    report = score(Task(), [(p, t, None) for p, t in zip(prompts, texts, strict=True)], timeout_seconds=100.0)  # type: ignore[arg-type]
    assert report.rewards == [1.0, 0.0, 1.0, 0.0] and not report.failures


def test_a_thread_that_is_told_to_give_up_leaves_no_answer_behind_for_the_next_question(symbolic: Symbolic) -> None:
    class Task:
        name = "slow"

        def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
            return float(symbolic.equal(text, "0.5"))

    assert symbolic._ask("1", "2") is False  # started
    prompts = [Prompt(str(i), "", (), "") for i in range(2)]
    items = [(prompts[0], "(1+x)^{900}(1-x)^{900}", None), (prompts[1], "\\frac{1}{2}", None)]
    report = score(Task(), items[:1], timeout_seconds=0.2)  # type: ignore[arg-type]
    assert report.rewards == [None] and len(report.failures) == 1
    assert score(Task(), items[1:], timeout_seconds=100.0).rewards == [1.0]  # type: ignore[arg-type]
    symbolic.close()
