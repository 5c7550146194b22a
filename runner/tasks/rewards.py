"""Calling a task's reward function so that one that raises or hangs costs its samples and not the run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.data import Sample
from runner.errors import told
from runner.foreign import Interrupted, interrupt
from runner.tasks.protocol import Prompt, Task

MOST_REWARD = 1e9  # in size: the squares that advantages are divided by stay finite in fp32
MAX_TIMEOUTS = 4  # hanging calls of one batch after which the rest of it counts as failed without being called

Item = tuple[Prompt, str, Sample | None]


def no_reward(value: Any) -> str:
    """Why a value is no reward, as what follows its name; "" for a finite number."""
    try:
        number = float(value) if not isinstance(value, str) else None
    except Exception:  # __float__ of anything
        number = None
    if number is None:
        return f"is a {type(value).__name__}, no number"
    if not math.isfinite(number):
        return f"is {number}"
    return f"is {number:g}, beyond {MOST_REWARD:g}" if abs(number) > MOST_REWARD else ""


@dataclass
class RewardReport:
    """Rewards in the order of the items; None where the function failed. `failures`: (prompt_id, reason)."""

    rewards: list[float | None]
    failures: list[tuple[str, str]] = field(default_factory=list)

    def message(self) -> str | None:
        """One line about all failures, or None without any."""
        if not self.failures:
            return None
        prompt_id, reason = self.failures[0]
        return f"the reward of {len(self.failures)} of {len(self.rewards)} samples failed; first {prompt_id}: {reason}"


class _Worker:
    """Scores items[first:] in a daemon thread; `lock` orders its results against the caller's decision to abandon it."""

    def __init__(self, task: Task, items: Sequence[Item], first: int, report: RewardReport) -> None:
        self.task, self.items, self.report = task, items, report
        self.index, self.started = first, time.monotonic()
        self.abandoned = False
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name="reward", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while self.index < len(self.items):
                self.started = time.monotonic()
                reward, reason = self._call(*self.items[self.index])
                with self.lock:
                    if self.abandoned:
                        return
                    self.report.rewards[self.index] = reward
                    if reason is not None:
                        self.report.failures.append((self.items[self.index][0].prompt_id, reason))
                    self.index += 1
        except Interrupted:
            pass  # the caller has already counted this sample as failed and gone on
        finally:
            self.done.set()

    def _call(self, prompt: Prompt, text: str, sample: Sample | None) -> tuple[float | None, str | None]:
        try:
            reward = self.task.reward(prompt, text, sample)
        except Interrupted:
            raise
        except BaseException as error:  # SystemExit of a library's exit() ends this sample only, not the thread and the rest
            return None, told(error, where=True)
        problem = no_reward(reward)
        return (None, f"what it returned {problem}") if problem else (float(reward), None)

    def abandon_if_late(self, timeout_seconds: float) -> bool:
        """Interrupt the current call if it is past its deadline. Only Python code can be interrupted: a call that blocks
        inside C code keeps its daemon thread until it returns, and its result is dropped."""
        with self.lock:
            if self.done.is_set() or time.monotonic() - self.started < timeout_seconds:
                return False
            self.abandoned = True
        interrupt(self.thread)
        return True


def score(task: Task, items: Sequence[Item], timeout_seconds: float) -> RewardReport:
    """The reward of every (prompt, response text, sample), each call limited to `timeout_seconds`.

    A call that raises (SystemExit and KeyboardInterrupt too), hangs or returns something that is not a finite number gives
    None and an entry in `failures`.
    """
    report = RewardReport(rewards=[None] * len(items))
    first, timeouts = 0, 0
    while first < len(items):
        worker = _Worker(task, items, first, report)
        while not worker.done.wait(min(0.05, timeout_seconds)):
            if worker.abandon_if_late(timeout_seconds):
                break
        if not worker.abandoned:
            if worker.index >= len(items):
                break
            report.failures.append((items[worker.index][0].prompt_id, "the thread that scored it ended"))
            first = worker.index + 1
            continue
        report.failures.append((items[worker.index][0].prompt_id, f"no answer within {timeout_seconds:g} s"))
        first, timeouts = worker.index + 1, timeouts + 1
        if timeouts == MAX_TIMEOUTS:
            skipped = f"not called, because {timeouts} calls before it hung"
            report.failures.extend((prompt.prompt_id, skipped) for prompt, _, _ in items[first:])
            break
    return report
