"""GSM8K: grade-school word problems; a line is {"question": ..., "answer": "... #### 72"}."""

from __future__ import annotations

from typing import Any

from runner.config.option import Option
from runner.tasks.grading import after_hashes, final_number
from runner.tasks.jsonl import MACHINE, RULES, JsonlTask, JsonlTaskConfig, Problem
from runner.tasks.numbers import quantity


class Gsm8kTask(JsonlTask):
    name = "gsm8k"
    hub_config = "main"

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        question, solution = row["question"], row["answer"]
        if not isinstance(question, str) or not isinstance(solution, str):
            raise TypeError("`question` and `answer` must be strings")
        answer = after_hashes(solution)
        if answer is None or quantity(answer, words=True) is None:
            raise ValueError("`answer` does not end in '#### <number>'")
        return Problem(({"role": "user", "content": question},), answer, place)

    def grade(self, answer: str, text: str) -> bool:
        r"""The number of the last '####' or \boxed{} must equal the reference; without either, wrong."""
        given, wanted = final_number(text), quantity(answer, words=True)
        return given is not None and wanted is not None and given.equals(wanted)


OPTION = Option(JsonlTaskConfig, rules=RULES, machine=MACHINE)
