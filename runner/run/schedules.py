"""When the rollout of a step is made: after the update before it (`sync`), or beside it (`one_step_off`).

One step off policy, the rollout of step k + 1 begins before step k is trained on, with the weights that are resident then, and
ends before new ones are sent. So the schedule alone decides which weights a sample comes from, never which side is faster: a run
that did the same things one after the other has the same numbers, and so has one that goes on from a checkpoint, of which the
pending rollout is a part.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runner.config.option import one_process
from runner.config.schema import Config
from runner.run import pending
from runner.run.collect import Collector, Rollout

SYNC, ONE_STEP_OFF = "sync", "one_step_off"
FOLDER = "rollout"  # of a checkpoint
MAKE_SAMPLES = (
    "algorithm.prompts_per_step",
    "algorithm.samples_per_prompt",
    "algorithm.dynamic_sampling",
    "model.",
    "rollout.sampling.",
    "router_replay.",
    "seed",
    "task.",
)


@dataclass
class Generated:
    """A rollout, what the pool counted for it, and how long generating and grading took.

    trainer_logprobs  [R] per sample of the first samples: the trainer's own, with the weights that generated the samples and with
                      their routes. Only where the mismatch is going to be decomposed.
    """

    rollout: Rollout
    pool_metrics: dict[str, float]
    seconds: float
    trainer_logprobs: list[torch.Tensor] | None = None


class Rollouts:
    """Gives every step its rollout. Whoever changes weights, or uses the pool for something else, calls `settle` first."""

    def __init__(self, cfg: Config, collector: Collector) -> None:
        self.collector = collector
        self.steps, self.ahead = cfg.steps, cfg.algorithm.schedule == ONE_STEP_OFF
        # Trainer and engine of one process compute one after the other: beside each other they only take each other's cores.
        self.beside = not one_process(cfg)
        self._pending: _Pending | None = None

    def take(self, step: int) -> Generated:
        """The rollout of `step`: the one that was begun, else made now. Raises Interrupted only in the second case."""
        if self._pending is None or self._pending.step != step:
            self.settle()
            self._pending = None
            return _generate(self.collector, step)
        found = self._pending.result()
        self._pending = None
        return found

    def begin(self, step: int) -> None:
        """Start the rollout of `step` with the weights that are resident now, where the schedule wants that."""
        if self.ahead and self._pending is None and step < self.steps:
            self._pending = _Pending(self.collector, step)
            if not self.beside:
                self.settle()

    def settle(self) -> Generated | None:
        """What was begun and not taken, when it is complete: nothing is being generated afterwards."""
        return self._pending.result() if self._pending else None

    def close(self) -> None:
        """Drop what was begun, when it has ended: the pool is free for another trainer."""
        if self._pending:
            self._pending.wait()
        self._pending = None

    def save(self, folder: Path) -> None:
        """Write what was begun and not taken into the checkpoint `folder`."""
        found = self.settle()
        if found is not None and self._pending is not None:
            content = (self._pending.step, found.rollout, found.pool_metrics, found.seconds, found.trainer_logprobs)
            pending.write(folder / FOLDER, content)

    def load(self, folder: Path, changed: list[str]) -> list[str]:
        """Take up what the checkpoint `folder` holds of a rollout; nothing where it holds none, or where a key changed since
        that other samples come from. Returns what to warn of."""
        if not (folder / FOLDER).is_dir():
            return []
        if reasons := [key for key in changed if key.startswith(MAKE_SAMPLES)]:
            return [f"the rollout that waits in {folder.name} is made anew: {', '.join(reasons)} changed"]
        step, *content = pending.read(folder / FOLDER)
        self._pending = _Pending(self.collector, step, Generated(*content))
        return []


@dataclass
class _Pending:
    """The rollout of `step`, in a thread of its own; an error is raised where it is asked for."""

    collector: Collector
    step: int
    found: Generated | None = None
    error: BaseException | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.found is None:
            # A stop waits for it: a rollout that was dropped could not be made again, its weights are gone.
            self.collector = copy.copy(self.collector)
            self.collector.should_stop = lambda: False
            self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.found = _generate(self.collector, self.step)
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> Generated:
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found


def _generate(collector: Collector, step: int) -> Generated:
    started = time.perf_counter()
    collector.pool.metrics()  # drop what the warm start, an evaluation or a probe counted: a resumed run did not do it again
    rollout = collector.collect(step)
    return Generated(rollout, collector.pool.metrics(), time.perf_counter() - started)
