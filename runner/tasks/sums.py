"""Sums of random numbers as problems, some of them held out: what the tasks of arithmetic and of the calculator draw."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from runner.errors import UserError
from runner.tasks.protocol import Prompt
from runner.tasks.seeding import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sums:
    """Half of a Task: its problems. `cfg` has operands, digits and eval_problems beside the keys of every task."""

    name: str

    def __init__(self, cfg: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """UserError when the numbers make no task: fewer problems than are held out, or prompts that are too long."""
        self.cfg, self.tokenizer = cfg, tokenizer
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
        numbers = stream(self.cfg.seed, self.name, "train", step, round)
        return [self._prompt(f"{self.name}/{step}.{round}.{index}", self._draw_train(numbers)) for index in range(count)]

    def eval_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(f"{self.name}/eval.{i}", numbers) for i, numbers in enumerate(self._held_out[:count])]

    def _text(self, numbers: tuple[int, ...]) -> str:
        return "+".join(f"{number:0{self.cfg.digits}d}" for number in numbers)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _prompt(self, prompt_id: str, numbers: tuple[int, ...]) -> Prompt:
        text = self._text(numbers) + "="
        return Prompt(prompt_id, text, tuple(self._ids(text)), str(sum(numbers)), {"numbers": list(numbers)})

    def _draw(self, numbers: random.Random) -> tuple[int, ...]:
        return tuple(numbers.randrange(10**self.cfg.digits) for _ in range(self.cfg.operands))

    def _draw_train(self, numbers: random.Random) -> tuple[int, ...]:
        while (drawn := self._draw(numbers)) in self._held_out_set:
            pass
        return drawn

    def _draw_held_out(self) -> list[tuple[int, ...]]:
        """Distinct problems, the same for every run seed, so that evaluations of different runs compare."""
        numbers = stream(self.name, "held out", self.cfg.operands, self.cfg.digits)
        chosen: dict[tuple[int, ...], None] = {}
        while len(chosen) < self.cfg.eval_problems:
            chosen[self._draw(numbers)] = None
        return list(chosen)
