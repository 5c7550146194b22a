"""Reward functions that raise, hang, or answer with something else than a number cost their own samples only."""

from __future__ import annotations

import contextlib
import sys
import time

import pytest

from runner.data import Sample
from runner.tasks import rewards
from runner.tasks.protocol import Prompt
from runner.tasks.rewards import MAX_TIMEOUTS, score
from tests.answers import arithmetic


class Unprintable(BaseException):
    def __str__(self) -> str:
        raise ValueError("no words")


class Misbehaving:
    """Does what the response says."""

    name = "misbehaving"

    def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
        if text == "raise":
            raise RuntimeError("broken")
        if text == "nan":
            return float("nan")
        if text == "exit":
            sys.exit(1)
        if text == "interrupt":
            raise KeyboardInterrupt
        if text == "close":
            raise GeneratorExit
        if text == "unprintable":
            raise Unprintable
        if text == "nothing":
            return None  # type: ignore[return-value]
        if text == "hang":
            while True:
                with contextlib.suppress(Exception):  # a function that swallows errors is interrupted all the same
                    time.sleep(0.001)
        return 1.0

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        return []

    def eval_prompts(self, count: int) -> list[Prompt]:
        return []


def items(*texts: str) -> list[tuple[Prompt, str, Sample | None]]:
    return [(Prompt(f"p{i}", "", (), ""), text, None) for i, text in enumerate(texts)]


def test_failing_rewards_cost_their_own_samples_only() -> None:
    report = score(Misbehaving(), items("ok", "raise", "ok", "nan", "hang", "ok"), timeout_seconds=0.1)
    assert report.rewards == [1.0, None, 1.0, None, None, 1.0]
    assert [prompt_id for prompt_id, _ in report.failures] == ["p1", "p3", "p4"]
    message = report.message()
    assert message is not None and "3 of 6" in message and "RuntimeError: broken" in message
    assert score(Misbehaving(), items("ok"), 0.1).message() is None
    assert score(Misbehaving(), [], 0.1).rewards == []


@pytest.mark.parametrize("how", ["raise", "nan", "exit", "interrupt", "close", "unprintable", "nothing"])
def test_whatever_a_reward_raises_the_samples_after_it_are_scored_and_it_is_told(how: str) -> None:
    report = score(Misbehaving(), items("ok", how, "ok", how, "ok"), timeout_seconds=5)
    assert report.rewards == [1.0, None, 1.0, None, 1.0]
    assert [prompt_id for prompt_id, _ in report.failures] == ["p1", "p3"] and all(reason for _, reason in report.failures)


def test_a_scoring_thread_that_dies_is_told_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(worker: rewards._Worker, prompt: Prompt, text: str, sample: Sample | None) -> tuple[float | None, str | None]:
        if text == "die":
            raise rewards.Interrupted
        return 1.0, None

    monkeypatch.setattr(rewards._Worker, "_call", call)
    report = score(Misbehaving(), items("ok", "die", "ok", "die"), timeout_seconds=5)
    assert report.rewards == [1.0, None, 1.0, None] and [prompt_id for prompt_id, _ in report.failures] == ["p1", "p3"]


def test_hanging_rewards_end_soon_and_leave_no_busy_thread() -> None:
    import threading

    start = time.monotonic()
    report = score(Misbehaving(), items("ok", *["hang"] * 50), timeout_seconds=0.05)
    assert time.monotonic() - start < 5
    assert report.rewards == [1.0, *[None] * 50] and len(report.failures) == 50
    assert sum("no answer" in reason for _, reason in report.failures) == MAX_TIMEOUTS
    deadline = time.monotonic() + 5
    while any(thread.name == "reward" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.name == "reward" for thread in threading.enumerate())


def test_ten_thousand_rewards_take_about_a_second() -> None:
    task = arithmetic()
    prompts = task.train_prompts(0, 100)
    batch = [(prompt, task.solution(tuple(prompt.info["numbers"])), None) for prompt in prompts] * 100
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        report = score(task, batch, timeout_seconds=5)
        seconds.append(time.perf_counter() - start)
    assert report.rewards == [1.0] * 10_000
    assert min(seconds) < 1.5
