"""DAPO-Math-17k and sets of its format (AIME): {"prompt": [messages], "reward_model": {"ground_truth": "34"}}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.config.option import Option
from runner.tasks import symbolic
from runner.tasks.grading import final_answer, same_answer
from runner.tasks.jsonl import MACHINE, NEEDS, RULES, JsonlTask, JsonlTaskConfig, Problem, conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DapoMathTask(JsonlTask):
    name = "dapo_math"
    answer_field = "label"
    eval_file = "eval.jsonl"
    eval_split = "train"  # the evaluation sets in this format have one split

    def __init__(self, cfg: JsonlTaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """As JsonlTask; the process that compares answers begins to start here."""
        super().__init__(cfg, tokenizer)
        symbolic.shared.start()

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        """`prompt` may also be a plain string, and the answer may lie in `label`, as in preprocessed copies."""
        answer = row["label"] if "label" in row else row["reward_model"]["ground_truth"]
        if not isinstance(answer, (str, int)) or not str(answer).strip():
            raise TypeError("the reference answer must be a string or an integer")
        return Problem(conversation(row["prompt"], "prompt"), str(answer).strip(), place)

    def grade(self, answer: str, text: str) -> bool:
        r"""The last \boxed{}, or the last 'Answer:' line where it comes later, must equal the reference; see grading.py."""
        given = final_answer(text)
        return given is not None and same_answer(given, answer)


OPTION = Option(JsonlTaskConfig, rules=RULES, machine=MACHINE, needs=NEEDS)
