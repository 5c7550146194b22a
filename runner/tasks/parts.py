"""Rewards of several parts: functions and services of the user's beside what the task or its environment gives."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from runner.config.schema import RewardConfig
from runner.data import Sample
from runner.errors import UserError, told
from runner.foreign import UserLoop
from runner.tasks import rewards as calls
from runner.tasks import service
from runner.tasks.protocol import Prompt

Item = tuple[Prompt, str, Sample]


def add(configured: dict[str, RewardConfig], items: Sequence[Item]) -> list[str]:
    """Add every configured part to the samples that have a reward, weigh all parts, and add them up. Returns warnings.

    A sample for which a part fails has no reward afterwards, and is left out: half of a reward would be another one.
    """
    graded = [item for item in items if item[2].reward is not None]
    warnings = []
    failed: set[int] = set()
    for name, part in configured.items():
        if part._target_ is None and part.url is None:
            continue  # the weight of a part that is there
        values, reasons = _values(name, part, graded)
        for index, ((_, _, sample), value) in enumerate(zip(graded, values, strict=True)):
            if value is None:
                failed.add(index)
            else:
                sample.rewards[name] = value
        if reasons:
            warnings.append(
                f"reward {name} failed for {sum(v is None for v in values)} of {len(graded)} samples; first: {reasons[0]}"
            )
    for index, (_, _, sample) in enumerate(graded):
        weighted = {
            name: value * (configured[name].weight if name in configured else 1.0) for name, value in sample.rewards.items()
        }
        sample.rewards = weighted
        sample.turn_rewards = [
            (place, name, value * (configured[name].weight if name in configured else 1.0))
            for place, name, value in sample.turn_rewards
        ]
        sample.reward = None if index in failed else sum(weighted.values())
    return warnings


def _values(name: str, part: RewardConfig, items: Sequence[Item]) -> tuple[list[float | None], list[str]]:
    if part.url is not None:
        batches = [items[start : start + part.batch_size] for start in range(0, len(items), part.batch_size)]
        with ThreadPoolExecutor(max_workers=8, thread_name_prefix="rewards") as threads:
            answers = list(threads.map(lambda batch: service.ask(part, batch), batches))
        return [value for values, _ in answers for value in values], [reason for _, reason in answers if reason]
    function = function_of(name, part)
    if inspect.iscoroutinefunction(function):
        return _together(function, items, part.timeout_seconds)
    report = calls.score(_Called(function), list(items), part.timeout_seconds)  # type: ignore[arg-type]
    return report.rewards, [reason for _, reason in report.failures]


def function_of(name: str, part: RewardConfig) -> Callable[..., Any]:
    """The function that a part names. UserError where it cannot be imported."""
    assert part._target_ is not None
    module, _, attribute = part._target_.rpartition(".")
    key = f"task.rewards.{name}._target_"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise UserError(
            f"{part._target_} cannot be imported: {told(error, where=True)}", key=key, fix="package.module.name on Python's path"
        ) from None
    if not callable(found):
        raise UserError(f"{part._target_} is no function", key=key, fix="def reward(prompt, text, sample) -> float")
    return found


def check(configured: dict[str, RewardConfig]) -> Iterator[UserError]:
    """What is wrong with the parts before a run begins."""
    for name, part in configured.items():
        key = f"task.rewards.{name}"
        if part._target_ is not None and part.url is not None:
            yield UserError("a part of the reward is a function or a service, not both", key=key, fix=f"{key}.url=null")
        elif part._target_ is not None:
            try:
                function_of(name, part)
            except UserError as error:
                yield error
        elif part.url is not None:
            yield from service.check(key, part)


def _together(function: Callable[..., Any], items: Sequence[Item], seconds: float) -> tuple[list[float | None], list[str]]:
    """All calls at one time. One that holds their event loop costs those that have no answer by then, and not the run."""
    late = f"no answer within {seconds:g} s"
    answers: list[float | str] = [late] * len(items)
    left = threading.Semaphore(0)
    loop = UserLoop("rewards")

    async def one(index: int) -> None:
        task = asyncio.ensure_future(function(*items[index]))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            return
        try:
            value = task.result()
        except BaseException as error:
            answers[index] = told(error, where=True)
            return
        problem = calls.no_reward(value)
        answers[index] = f"what it returned {problem}" if problem else float(value)

    def begin(index: int) -> None:
        loop.spawn(one(index), index).add_done_callback(lambda _: left.release())

    for index in range(len(items)):
        loop.call(begin, index)
    for _ in items:
        lost = False
        while not lost and not left.acquire(timeout=0.5):
            lost = loop.look() == "lost"
        if lost:
            break
    found = list(answers)  # what a lost loop says later is not heard
    loop.close()
    return [a if isinstance(a, float) else None for a in found], [a for a in found if isinstance(a, str)]


@dataclass
class _Called:
    """A function as the task that `rewards.score` calls."""

    function: Callable[..., Any]

    def reward(self, prompt: Prompt, text: str, sample: Sample | None) -> float:
        return self.function(prompt, text, sample)
