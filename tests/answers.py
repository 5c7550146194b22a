"""Grading as the tasks do it."""

from __future__ import annotations

from runner.tasks.dapo_math import DapoMathTask
from runner.tasks.gsm8k import Gsm8kTask


def gsm8k(reference: str, text: str) -> bool:
    return Gsm8kTask.grade(None, reference, text)  # type: ignore[arg-type]


def dapo(reference: str, text: str) -> bool:
    return DapoMathTask.grade(None, reference, text)  # type: ignore[arg-type]
