"""When a warm start ends: a first look of few problems must be confirmed by a second one of other problems."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runner.config import compose
from runner.config.schema import Config
from runner.models.tokenizer import byte_tokenizer
from runner.run import warm_start
from runner.run.collect import Interrupted
from runner.tasks.arithmetic import ArithmeticTask
from runner.tasks.protocol import Prompt

FIRST, SECOND = warm_start.CHECK_PROMPTS, warm_start.CONFIRM_PROMPTS


class Looks:
    """A collector whose samples have the rewards that `script` gives look by look, on the task's own problems."""

    def __init__(self, cfg: Config, script: list[float]) -> None:
        self.task, self.stop_token_ids = ArithmeticTask(cfg.task, byte_tokenizer()), (1,)  # type: ignore[arg-type]
        self.script, self.asked = list(script), list[list[Prompt]]()

    def generate(self, prompts: list[Prompt], samples: int, *given: Any, **named: Any) -> list[Any]:
        assert samples == 1
        self.asked.append(prompts)
        right = round(self.script.pop(0) * len(prompts))
        return [SimpleNamespace(reward=float(index < right)) for index in range(len(prompts))]


class Trainer:
    steps = 0

    def sft_step(self, pairs: Any, *, lr: float, images: Any) -> dict[str, float]:
        self.steps += 1
        return {"sft/loss": 1.0}


class Silent:
    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Any]:
        yield SimpleNamespace(advance=lambda *given: None)


def trained(script: list[float], *overrides: str) -> tuple[dict[str, Any], Looks, list[int]]:
    """(summary, the looks that were taken, the trainer's steps at each weight sync)"""
    cfg = compose.load_config(
        ["model=tiny_dense", "warm_start.max_steps=40", "warm_start.check_interval_steps=10", "warm_start.batch_size=2"]
        + ["warm_start.stop_at_reward=0.5", *overrides]
    )
    looks, trainer, synced = Looks(cfg, script), Trainer(), list[int]()
    given: Any = (cfg, trainer, looks, lambda: synced.append(trainer.steps), byte_tokenizer(), 1, Silent(), lambda: False)
    return warm_start._train(*given), looks, synced


def test_it_ends_when_other_problems_confirm() -> None:
    summary, looks, synced = trained([0.25, 0.625, 0.75])
    assert summary == {"reward": 0.75, "steps": 20} and synced == [10, 20]  # the larger look is what is reported
    assert [len(asked) for asked in looks.asked] == [FIRST, FIRST, SECOND] and SECOND >= 4 * FIRST
    first, second = ({prompt.text for prompt in asked} for asked in looks.asked[1:])
    assert len(first & second) < FIRST / 4, "a second look at the problems of the first one confirms nothing"


def test_a_lucky_look_does_not_end_it() -> None:
    summary, looks, synced = trained([0.625, 0.375, 0.875, 0.25, 0.5, 0.5])
    assert summary == {"reward": 0.5, "steps": 30} and synced == [10, 20, 30]
    assert [len(asked) for asked in looks.asked] == [FIRST, SECOND] * 3


def test_without_luck_there_is_no_second_look_and_the_last_step_is_looked_at() -> None:
    summary, looks, synced = trained([0.25, 0.375, 0.25], "warm_start.max_steps=25")
    assert summary == {"reward": 0.25, "steps": 25} and synced == [10, 20, 25]
    assert [len(asked) for asked in looks.asked] == [FIRST] * 3


def test_an_interrupt_between_two_steps_ends_it() -> None:
    cfg = compose.load_config(["model=tiny_dense"])
    given: Any = (cfg, Trainer(), Looks(cfg, []), lambda: None, byte_tokenizer(), 1, Silent(), lambda: True)
    with pytest.raises(Interrupted):
        warm_start._train(*given)
