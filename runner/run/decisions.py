"""Decisions that a pool makes by measuring time: taken at the end of a step, recorded as events, repeated on resume.

A checkpoint holds the decisions made before it. One made after it stands in events.jsonl alone when the run is killed:
the resumed run, whose own clock might say otherwise, repeats it at the same step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.rollout.protocol import RolloutPool
from runner.tracking.base import POOL_DECISION
from runner.tracking.folder import read_jsonl


class Decisions:
    """`first_step`: the step that this attempt starts with; decisions recorded at it or later are repeated."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        events = [row for row in read_jsonl(run_dir / "events.jsonl") if row["kind"] == POOL_DECISION]
        self.recorded: dict[int, dict[str, Any]] = {
            row["data"]["step"]: row["data"]["decision"] for row in events if row["data"]["step"] >= first_step
        }

    def at_end_of(self, step: int, pool: RolloutPool) -> dict[str, Any] | None:
        """What takes effect with the next step, for the tracker to record; None when nothing changes."""
        if step in self.recorded:
            decision = self.recorded.pop(step)
            pool.apply(decision)
            return decision
        return None if self.recorded else pool.decide()
