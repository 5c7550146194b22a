"""GSM8K: grade-school word problems; a row is {"question": ..., "answer": "... #### 72"}, or has the number alone."""

from __future__ import annotations

from typing import Any

from runner.config.option import Option
from runner.tasks.grading import after_hashes, final_number
from runner.tasks.jsonl import MACHINE, NEEDS, RULES, JsonlTask, JsonlTaskConfig, Problem, conversation
from runner.tasks.numbers import quantity


class Gsm8kTask(JsonlTask):
    name = "gsm8k"
    prompt_field = "question"
    hub_config = "main"

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        messages, solution = conversation(row["question"], "question"), row["answer"]
        if not isinstance(solution, str | int) or isinstance(solution, bool):
            raise TypeError("`answer` must be a string or an integer")
        answer = after_hashes(str(solution)) or str(solution).strip()
        if quantity(answer, words=True) is None:
            raise ValueError("`answer` neither ends in '#### <number>' nor is a number")
        return Problem(messages, answer, place)

    def grade(self, answer: str, text: str) -> bool:
        r"""The number of the last '####' or \boxed{} must equal the reference; without either, wrong."""
        given, wanted = final_number(text), quantity(answer, words=True)
        return given is not None and wanted is not None and given.equals(wanted)


OPTION = Option(JsonlTaskConfig, rules=RULES, machine=MACHINE, needs=NEEDS)
