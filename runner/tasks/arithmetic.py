"""Addition with a written-out carry: a task that a tiny model learns from nothing, with answers of a few dozen tokens.

    prompt    776+911=
    solution  6+1+0=07,7+1+0=08,7+9+0=16=1687

One column per comma, least significant digit first: the digits, the carry into the column, their sum with two digits.
The number after the last '=' is the answer. Numbers are zero-padded so that a column's digits are always equally far away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import TaskConfig
from runner.tasks.protocol import Prompt
from runner.tasks.rules import held_out
from runner.tasks.seeding import stream
from runner.tasks.sums import Sums

if TYPE_CHECKING:
    from runner.data import Sample

MAX_OPERANDS = 10  # 10 * 9 and a carry of 9 still fit into the two digits of a column sum


@dataclass
class ArithmeticTaskConfig(TaskConfig):
    operands: int = number(ge=2, le=MAX_OPERANDS)  # numbers that are added
    digits: int = number(ge=1, le=100)  # of each number, at most
    eval_problems: int = number(ge=1, le=10**6)  # held out from training


class ArithmeticTask(Sums):
    name = "arithmetic"

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        """1 if the number after the last '=' is the sum, else 0; leading zeros are allowed, anything else is not."""
        answer = text.rpartition("=")[2].strip()
        if "=" not in text or not answer.isascii() or not answer.isdigit() or len(answer) > self.cfg.digits + 8:
            return 0.0
        return float(int(answer) == int(prompt.answer))

    def worked_solutions(self, count: int, seed: int) -> list[tuple[str, str]]:
        """`count` (prompt text, solution text) pairs; held-out problems never appear."""
        random_stream = stream(self.cfg.seed, "arithmetic", "worked", seed)
        drawn = (self._draw_train(random_stream) for _ in range(count))
        return [(self._text(numbers) + "=", self.solution(numbers)) for numbers in drawn]

    def solution(self, numbers: tuple[int, ...]) -> str:
        """The worked solution of one problem."""
        columns, carry = [], 0
        for column in range(self.cfg.digits):
            digits = [number // 10**column % 10 for number in numbers]
            total = sum(digits) + carry
            columns.append("+".join(map(str, [*digits, carry])) + f"={total:02d}")
            carry = total // 10
        return ",".join(columns) + f"={sum(numbers):0{self.cfg.digits + 1}d}"


OPTION = Option(ArithmeticTaskConfig, rules=(held_out,))
