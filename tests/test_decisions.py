"""A decision made by a clock is repeated by a resumed run: the loop's orchestration, with a pool whose clock is made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.rollout.local.speculation import NgramSpeculation
from runner.run.decisions import Decisions
from runner.tracking.base import POOL_DECISION
from runner.tracking.tracker import JsonlTracker

STEPS, DECIDE_AFTER, INTERVAL = 12, 6, 4


class ClockPool:
    """The engine's own speculation object; 2 engine steps per run step, timed by `seconds` of (proposing, plain)."""

    def __init__(self, seconds: tuple[float, float]) -> None:
        self.speculation = NgramSpeculation(4, 2, 4, True, DECIDE_AFTER)
        self.seconds = dict(zip((True, False), seconds, strict=True))
        self.state, self.load_state = self.speculation.state, self.speculation.load_state
        self.decide, self.apply = self.speculation.decide, self.speculation.apply

    def work(self) -> tuple[bool, list[bool]]:
        """One run step: whether speculation was on, and which engine steps proposed."""
        kinds = []
        for _ in range(2):
            timed = self.speculation._timed
            measuring = self.speculation._measuring
            plain = not self.speculation.enabled or (measuring and timed[True][0] > timed[False][0])
            self.speculation._plain_turn = plain
            self.speculation.record(None, np.zeros(1, np.int64), tokens=10, seconds=self.seconds[not plain])
            kinds.append(not plain)
        return self.speculation.enabled, kinds


def attempt(folder: Path, pool: ClockPool, saved: dict[str, Any] | None, until: int) -> tuple[list[Any], dict[str, Any] | None]:
    """Steps from the checkpoint `saved` on, killed before step `until`; (what every step did, last checkpoint)."""
    first = saved["step"] if saved else 0
    if saved:
        pool.load_state(saved["pool"])
    tracker = JsonlTracker(folder, first, resumed=saved is not None)
    decisions = Decisions(folder, first)
    done = []
    for step in range(first, until):
        done.append(pool.work())
        if decision := decisions.at_end_of(step, pool):  # type: ignore[arg-type]
            tracker.event(POOL_DECISION, "decided", {"step": step, "decision": decision})
        if (step + 1) % INTERVAL == 0:
            saved = json.loads(json.dumps({"step": step + 1, "pool": pool.state()}))
    return done, saved


def recorded(folder: Path) -> list[tuple[int, bool]]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(row["data"]["step"], row["data"]["decision"]["disabled"]) for row in rows if row["kind"] == POOL_DECISION]


@pytest.mark.parametrize("first_clock", [(2.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("killed_before", [6, 7, 8, 10])
def test_a_resumed_run_repeats_what_the_killed_one_decided(
    tmp_path: Path, first_clock: tuple[float, float], killed_before: int
) -> None:
    whole, _ = attempt(tmp_path, ClockPool(first_clock), None, STEPS)
    assert recorded(tmp_path) == [(5, first_clock[0] > first_clock[1])]
    assert whole[5][0] and whole[6][0] == (first_clock[0] < first_clock[1])  # in effect from the next step on
    folder = tmp_path / "killed"
    folder.mkdir()
    begun, saved = attempt(folder, ClockPool(first_clock), None, killed_before)
    assert saved is not None and saved["step"] == (4 if killed_before < 8 else 8) and recorded(folder) == recorded(tmp_path)
    opposite = ClockPool((first_clock[1], first_clock[0]))  # this time the clock says the opposite
    rest, _ = attempt(folder, opposite, saved, STEPS)
    assert begun[: saved["step"]] + rest == whole
    assert set(recorded(folder)) == set(recorded(tmp_path))


def test_without_a_record_the_resumed_run_decides_by_itself(tmp_path: Path) -> None:
    _, saved = attempt(tmp_path, ClockPool((2.0, 1.0)), None, 5)  # killed before the step that decides
    assert saved is not None and not recorded(tmp_path)
    opposite = ClockPool((1.0, 3.0))
    attempt(tmp_path, opposite, saved, STEPS)
    assert [step for step, _ in recorded(tmp_path)] == [5]
