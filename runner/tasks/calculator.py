"""Sums over several calls of a calculator: a task of several turns that a tiny model learns.

    prompt       12+34+56=
    model        12+34          a call: two numbers
    environment  46;
    model        46+56
    environment  102;
    model        =102           the answer

The calculator adds two numbers at a time, so that a sum of n numbers takes n - 1 calls and the model has to carry results on.
Every turn ends with the end token. A turn that is neither a call nor an answer is answered by `?;` and costs something.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import TaskConfig
from runner.tasks.protocol import Prompt
from runner.tasks.rules import held_out, turns_needed
from runner.tasks.seeding import stream
from runner.tasks.sums import Sums

if TYPE_CHECKING:
    from runner.data import Sample

MAX_DIGITS = 12  # of a number in a call
_CALL = re.compile(rf"(\d{{1,{MAX_DIGITS}}})\+(\d{{1,{MAX_DIGITS}}})", re.ASCII)
_ANSWER = re.compile(rf"=(\d{{1,{MAX_DIGITS}}})", re.ASCII)


@dataclass
class CalculatorTaskConfig(TaskConfig):
    operands: int = number(ge=2, le=10)
    digits: int = number(ge=1, le=8)  # of each number
    format_penalty: float = number(ge=0, le=10)  # for each turn that is neither a call nor an answer
    eval_problems: int = number(ge=1, le=10**6)  # held out from training


class Calculator:
    """The environment (task.rollout.environment) of one problem."""

    def __init__(self, format_penalty: float) -> None:
        self.penalty = format_penalty
        self.answer = 0

    async def reset(self, prompt: Prompt) -> None:
        self.answer = int(prompt.answer)

    async def step(self, response: str) -> tuple[str, bool, dict[str, Any]]:
        """Rewards: `answer` is 1 for the right one; `format` is minus the penalty for a turn that says nothing."""
        if call := _CALL.fullmatch(response):
            total = str(int(call[1]) + int(call[2]))
            return f"{total};", False, {"tool_calls": 1, "result": total}
        if answer := _ANSWER.fullmatch(response):
            return "", True, {"rewards": {"answer": float(int(answer[1]) == self.answer)}}
        return "?;", False, {"tool_errors": 1, "rewards": {"format": -self.penalty}}


class CalculatorTask(Sums):
    name = "calculator"

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        """Of a conversation that never answered: nothing. The environment rewards all others."""
        return 0.0

    def worked_solutions(self, count: int, seed: int) -> list[tuple[Prompt, str]]:
        """One turn each: a prompt with the turns before it, and what the model should say. A problem gives all of its turns."""
        numbers = stream(self.cfg.seed, "calculator", "worked", seed)
        found: list[tuple[Prompt, str]] = []
        while len(found) < count:
            found += self._worked(self._draw_train(numbers))
        return found[:count]

    def _worked(self, numbers: tuple[int, ...]) -> Iterator[tuple[Prompt, str]]:
        end = self.tokenizer.eos_token_id
        tokens, total = list(self._prompt("worked", numbers).tokens), numbers[0]
        first = self._text(numbers[:1])
        for following in numbers[1:]:
            call = f"{first}+{following:0{self.cfg.digits}d}"
            yield Prompt("worked", "", tuple(tokens), ""), call
            total += following
            first = str(total)
            tokens += [*self._ids(call), end, *self._ids(f"{total};")]
        yield Prompt("worked", "", tuple(tokens), ""), f"={total}"


has_turns = turns_needed("a sum takes several turns with the calculator")
OPTION = Option(CalculatorTaskConfig, rules=(held_out, has_turns))
