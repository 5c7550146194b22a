"""Conversations: a sample that is several turns of the model, with what an environment answers in between.

`task.rollout._target_` names an async function `rollout(engine, prompt, context)` of the user's; `drive` is the one that takes
turns with an environment. docs/turns.md has both in full.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "drive":
        from runner.turns.environment import drive

        return drive
    raise AttributeError(name)
