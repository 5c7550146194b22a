"""When the rollout of a step is made: after the update before it (`sync`), or beside updates (`one_step_off`, `async`).

One step off policy, the rollout of step k + 1 begins before step k is trained on, with the weights that are resident then, and
ends before new ones are sent. So the schedule alone decides which weights a sample comes from, never which side is faster: a run
that did the same things one after the other has the same numbers, and so has one that goes on from a checkpoint, of which the
pending rollout is a part.

Asynchronously, rollouts of the next `max_staleness` steps are under way and go on while weights change: a sample that is not
finished continues under the new ones (its `weight_spans` say which tokens came from which). A step is trained on the prompts that
it would have had anyway and in that order, so a request that is admitted at version v is trained on at v + max_staleness at the
latest, and nothing is lost or made twice over a kill: what is complete is in the checkpoint, the rest is generated again.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from runner.config.choices import Schedule
from runner.config.option import one_process
from runner.config.schema import Config
from runner.run import pending
from runner.run.collect import Collector, Rollout

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


def notes(cfg: Config) -> list[str]:
    """What to tell of a schedule that cannot do all that its name says."""
    if cfg.algorithm.schedule == Schedule.sync or not one_process(cfg):
        return []
    return [f"{cfg.algorithm.schedule} in one process: samples are an update behind, and nothing runs beside the trainer"]


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
    """Gives every step its rollout. Whoever changes weights calls `settle` first."""

    def __init__(self, cfg: Config, collector: Collector) -> None:
        self.collector = collector
        schedule = cfg.algorithm.schedule
        self.steps = cfg.steps
        # steps that a rollout may be ahead
        self.depth = {Schedule.sync: 0, Schedule.one_step_off: 1, Schedule["async"]: cfg.algorithm.max_staleness}[schedule]
        self.over_updates = schedule == Schedule["async"]
        # Trainer and engine of one process compute one after the other: beside each other they only take each other's cores.
        self.beside = not one_process(cfg)
        self._pending: dict[int, _Pending] = {}

    def take(self, step: int) -> Generated:
        """The rollout of `step`, when it is complete; those that the schedule allows beside it are begun first. Raises
        Interrupted when it could not be completed, and is made again from its beginning."""
        if self.depth == 0 and step not in self._pending:
            return _generate(self.collector, step)
        together = self.depth if self.over_updates else 0
        for ahead in range(step, step + together + 1):
            self._begin(ahead)
        found = self._pending.pop(step).result()
        for ahead in range(step + 1, step + self.depth + 1):  # one at a time, where an engine cannot do more
            self._begin(ahead)
        if self.over_updates:  # several rollouts share what the pool counts: a step shows what came since the one before it
            found.pool_metrics = self.collector.pool.metrics()
        return found

    def _begin(self, step: int) -> None:
        if step in self._pending or step >= self.steps:
            return
        self._pending[step] = _Pending(self.collector, step, over_updates=self.over_updates)
        if not self.beside:
            self._pending[step].wait()

    def waiting(self, step: int) -> Generated | None:
        """The rollout of `step`, where it was begun: it is waited for, and can still be taken."""
        return self._pending[step].result() if step in self._pending else None

    def settle(self) -> None:
        """Before weights change: nothing is being generated afterwards that may not go on under other weights."""
        if not self.over_updates:
            for pending_one in self._pending.values():
                pending_one.result()

    def close(self) -> None:
        """Drop what was begun, when it has ended: the pool is free for another trainer."""
        for pending_one in self._pending.values():
            pending_one.drop()
        for pending_one in self._pending.values():
            pending_one.wait()
        self._pending = {}

    def save(self, folder: Path) -> None:
        """Write what is complete and not taken into the checkpoint `folder`."""
        complete = [(step, one.found) for step, one in sorted(self._pending.items()) if one.found is not None]
        if complete:
            content = [(step, g.rollout, g.pool_metrics, g.seconds, g.trainer_logprobs) for step, g in complete]
            pending.write(folder / FOLDER, content)

    def load(self, folder: Path, changed: list[str]) -> list[str]:
        """Take up what the checkpoint `folder` holds of rollouts; nothing where it holds none, or where a key changed since
        that other samples come from. Returns what to warn of."""
        if not (folder / FOLDER).is_dir():
            return []
        if reasons := [key for key in changed if key.startswith(MAKE_SAMPLES)]:
            return [f"the rollout that waits in {folder.name} is made anew: {', '.join(reasons)} changed"]
        for step, rollout, *content in pending.read(folder / FOLDER):
            for sample in rollout.all_samples:
                sample.served = []  # in the time of another attempt, which the timeline of this one does not reach back to
            self._pending[step] = _Pending(self.collector, step, Generated(rollout, *content))
        return []


class _Pending:
    """The rollout of `step`, in a thread of its own unless it is `found`; an error is raised where it is asked for.

    A stop waits for it where it could not be made again, because its weights are gone then; one that goes `over_updates` ends.
    """

    def __init__(self, collector: Collector, step: int, found: Generated | None = None, *, over_updates: bool = False) -> None:
        self.step, self.found = step, found
        self._error: BaseException | None = None
        self._over_updates = over_updates
        self._dropped = threading.Event()
        self._thread: threading.Thread | None = None
        if found is None:
            stops = collector.should_stop
            self._collector = copy.copy(collector)
            self._collector.should_stop = lambda: self._dropped.is_set() or (over_updates and stops())
            self._thread = threading.Thread(target=self._run, name=f"rollout {step}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.found = _generate(self._collector, self.step, counts=not self._over_updates)
        except BaseException as error:
            self._error = error

    def drop(self) -> None:
        self._dropped.set()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def result(self) -> Generated:
        self.wait()
        if self._error is not None:
            raise self._error
        assert self.found is not None
        return self.found


def _generate(collector: Collector, step: int, counts: bool = True) -> Generated:
    """`counts`: nobody else uses the pool meanwhile, so what it counts is this rollout's."""
    started = time.perf_counter()
    if counts:
        collector.pool.metrics()  # drop what the warm start, an evaluation or a probe counted: a resumed run did not do it again
    rollout = collector.collect(step)
    return Generated(rollout, collector.pool.metrics() if counts else {}, time.perf_counter() - started)
