"""Addition with a written-out carry: a task that a tiny model learns from nothing, with answers of a few dozen tokens.

    prompt    776+911=
    solution  6+1+0=07,7+1+0=08,7+9+0=16=1687

One column per comma, least significant digit first: the digits, the carry into the column, their sum with two digits.
The number after the last '=' is the answer. Numbers are zero-padded so that a column's digits are always equally far away.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import Config, TaskConfig
from runner.errors import UserError
from runner.tasks.protocol import Prompt
from runner.tasks.seeding import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample

MAX_OPERANDS = 10  # 10 * 9 and a carry of 9 still fit into the two digits of a column sum


@dataclass
class ArithmeticTaskConfig(TaskConfig):
    operands: int = number(ge=2, le=MAX_OPERANDS)  # numbers that are added
    digits: int = number(ge=1, le=100)  # of each number, at most
    eval_problems: int = number(ge=1, le=10**6)  # held out from training


class ArithmeticTask:
    name = "arithmetic"

    def __init__(self, cfg: ArithmeticTaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """UserError when the numbers make no task: fewer problems than are held out, or prompts that are too long."""
        self.cfg = cfg
        self.tokenizer = tokenizer
        problems = 10 ** (cfg.digits * cfg.operands)
        if 2 * cfg.eval_problems > problems:
            raise UserError(
                f"{cfg.eval_problems} held-out problems of {problems} that exist leave too few to train on",
                key="task.eval_problems",
                fix=f"hold out at most {problems // 2}, or use more digits",
            )
        self._held_out = self._draw_held_out()
        self._held_out_set = frozenset(self._held_out)
        longest = len(self._prompt("check", self._held_out[0] if self._held_out else (0,) * cfg.operands).tokens)
        if longest > cfg.max_prompt_tokens:
            raise UserError(
                f"prompts have {longest} tokens, more than task.max_prompt_tokens={cfg.max_prompt_tokens}",
                key="task.max_prompt_tokens",
                fix=f"raise it to {longest}, or use fewer digits or operands",
            )

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        """See Task. Problems are drawn afresh for every (step, round), without those that are held out."""
        random_stream = stream(self.cfg.seed, "arithmetic", "train", step, round)
        return [self._prompt(f"arithmetic/{step}.{round}.{index}", self._draw_train(random_stream)) for index in range(count)]

    def eval_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(f"arithmetic/eval.{i}", numbers) for i, numbers in enumerate(self._held_out[:count])]

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
        return [(self._prompt_text(numbers), self.solution(numbers)) for numbers in drawn]

    def solution(self, numbers: tuple[int, ...]) -> str:
        """The worked solution of one problem."""
        columns, carry = [], 0
        for column in range(self.cfg.digits):
            digits = [number // 10**column % 10 for number in numbers]
            total = sum(digits) + carry
            columns.append("+".join(map(str, [*digits, carry])) + f"={total:02d}")
            carry = total // 10
        return ",".join(columns) + f"={sum(numbers):0{self.cfg.digits + 1}d}"

    def _prompt_text(self, numbers: tuple[int, ...]) -> str:
        return "+".join(f"{number:0{self.cfg.digits}d}" for number in numbers) + "="

    def _prompt(self, prompt_id: str, numbers: tuple[int, ...]) -> Prompt:
        text = self._prompt_text(numbers)
        tokens = tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return Prompt(prompt_id, text, tokens, str(sum(numbers)), {"numbers": list(numbers)})

    def _draw(self, random_stream: random.Random) -> tuple[int, ...]:
        return tuple(random_stream.randrange(10**self.cfg.digits) for _ in range(self.cfg.operands))

    def _draw_train(self, random_stream: random.Random) -> tuple[int, ...]:
        while (numbers := self._draw(random_stream)) in self._held_out_set:
            pass
        return numbers

    def _draw_held_out(self) -> list[tuple[int, ...]]:
        """Distinct problems, the same for every run seed, so that evaluations of different runs compare."""
        random_stream = stream("arithmetic", "held out", self.cfg.operands, self.cfg.digits)
        chosen: dict[tuple[int, ...], None] = {}
        while len(chosen) < self.cfg.eval_problems:
            chosen[self._draw(random_stream)] = None
        return list(chosen)


def held_out(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, ArithmeticTaskConfig)
    if task.eval_problems < cfg.evaluation.num_prompts:
        yield UserError(
            f"{cfg.evaluation.num_prompts} prompts are evaluated, {task.eval_problems} are held out",
            key="evaluation.num_prompts",
            fix=f"task.eval_problems={cfg.evaluation.num_prompts}",
        )


OPTION = Option(ArithmeticTaskConfig, rules=(held_out,))
