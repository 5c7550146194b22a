"""GSM8K: grade-school word problems; a line is {"question": ..., "answer": "... #### 72"}."""

from __future__ import annotations

from typing import Any

from runner.tasks.grading import after_hashes, last_boxed, number
from runner.tasks.jsonl import JsonlTask, Problem


class Gsm8kTask(JsonlTask):
    name = "gsm8k"
    hub_config = "main"

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        question, solution = row["question"], row["answer"]
        if not isinstance(question, str) or not isinstance(solution, str):
            raise TypeError("`question` and `answer` must be strings")
        answer = after_hashes(solution)
        if answer is None or number(answer) is None:
            raise ValueError("`answer` does not end in '#### <number>'")
        return Problem(({"role": "user", "content": question},), answer, place)

    def grade(self, answer: str, text: str) -> bool:
        r"""The number after the last '####', else in the last \boxed{}, must equal the reference; without either, wrong."""
        given = after_hashes(text)
        if given is None:
            given = last_boxed(text)
        value = None if given is None else number(given)
        return value is not None and value == number(answer)
