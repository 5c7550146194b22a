"""Tasks as tests make them, and grading as they do it."""

from __future__ import annotations

from typing import Any

from runner.models.tokenizer import byte_tokenizer
from runner.tasks.arithmetic import ArithmeticTask, ArithmeticTaskConfig
from runner.tasks.dapo_math import DapoMathTask
from runner.tasks.gsm8k import Gsm8kTask

TOKENIZER = byte_tokenizer()


def arithmetic(**fields: Any) -> ArithmeticTask:
    base: dict[str, Any] = {
        "name": "arithmetic",
        "train_path": None,
        "eval_path": None,
        "max_prompt_tokens": 64,
        "reward_timeout_seconds": 1.0,
        "seed": 0,
        "operands": 2,
        "digits": 2,
        "eval_problems": 64,
    }
    return ArithmeticTask(ArithmeticTaskConfig(**(base | fields)), TOKENIZER)


def gsm8k(reference: str, text: str) -> bool:
    return Gsm8kTask.grade(None, reference, text)  # type: ignore[arg-type]


def dapo(reference: str, text: str) -> bool:
    return DapoMathTask.grade(None, reference, text)  # type: ignore[arg-type]
