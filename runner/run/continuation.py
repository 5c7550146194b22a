"""What a resumed run goes on with: the learning-rate plan, the place in the data, and the names of what was changed.

A checkpoint remembers these three (`remembered`), so that a run that was made longer, or goes on with another batch size or other
data, neither jumps nor skips nor repeats without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.config.choices import LrSchedule
from runner.config.schema import Config
from runner.run import checkpoint
from runner.run.collect import Collector
from runner.tracking.folder import leaves, plain_config
from runner.trainer.optimizer import learning_rate, planned_steps

DECAY = "trainer.optimizer.lr_decay_steps"
# Where a run lies and what it writes: a change of these changes nothing that is trained.
INDIFFERENT = ("resume", "run_name", "outputs_dir", "steps", "tracking.", "checkpoint.", "watch.", "convert.", DECAY)
SHOWN = 12  # changed keys that are listed


def remembered(cfg: Config, collector: Collector, step: int) -> dict[str, Any]:
    """What the checkpoint after `step` steps holds for `keep_schedule` and `go_on`."""
    return {"data": collector.data_state(step), "lr_decay_steps": planned_steps(cfg), "config": plain_config(cfg)}


def keep_schedule(cfg: Config, begin: Path | None) -> None:
    """The learning rate keeps the plan that the run began with, however long it is made now, unless a new one is given."""
    if begin is not None and cfg.trainer.optimizer.lr_decay_steps is None:
        cfg.trainer.optimizer.lr_decay_steps = checkpoint.read_state(begin).get("lr_decay_steps")


def go_on(cfg: Config, collector: Collector, state: dict[str, Any] | None) -> list[str]:
    """Put the collector at its place in the data; returns what to warn of. `state` of the checkpoint, None: from the start."""
    if state is None:
        collector.continue_at(0, None)
        return []
    notes = []
    if changed := [text for _, text in _changes(cfg, state)]:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        notes.append(f"from step {state['step'] + 1} on with other options: {', '.join(changed[:SHOWN])}{more}")
    optimizer, all_steps = cfg.trainer.optimizer, cfg.steps * cfg.algorithm.updates_per_rollout
    planned = planned_steps(cfg)
    if optimizer.lr_schedule != LrSchedule.constant and planned != all_steps and state.get("lr_decay_steps") == planned:
        end = learning_rate(optimizer, planned, planned)
        notes.append(
            f"the {optimizer.lr_schedule} learning rate keeps its plan of {planned} updates, after which it is {end:g}; the run "
            f"now has {all_steps}; {DECAY}={all_steps} plans it anew, with a jump"
        )
    data = collector.continue_at(state["step"], state.get("data"))
    return [*notes, *([data] if data else [])]


def changed_keys(cfg: Config, state: dict[str, Any]) -> list[str]:
    """The keys that have another value than when the checkpoint with this `state` was saved."""
    return [key for key, _ in _changes(cfg, state)]


def _changes(cfg: Config, state: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, `key: old -> new`) of every value that differs; [] for a checkpoint that does not hold its config."""
    if "config" not in state:
        return []
    old, new = dict(leaves(state["config"])), dict(leaves(plain_config(cfg)))
    return [
        (key, f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}")
        for key in {**old, **new}
        if old.get(key) != new.get(key) and not key.startswith(INDIFFERENT)
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
