"""The RL loop: generate, reward, advantage, update, sync. Everything else a step does is one call away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from runner.algorithms.advantages import compute_advantages
from runner.config.schema import Config
from runner.data import Batch
from runner.rollout.protocol import RolloutPool
from runner.run import continuation, mismatch, samples
from runner.run.checkpoint import Checkpoints
from runner.run.collect import Collector, Interrupted, Rollout
from runner.run.decisions import Decisions
from runner.run.evaluation import evaluate
from runner.run.schedules import Generated, Rollouts
from runner.run.sync import WeightSync
from runner.run.watch import Watcher
from runner.tracking.base import POOL_DECISION, State, Tracker
from runner.tracking.timeline import Span, served
from runner.trainer.protocol import StepResult, Trainer


@dataclass
class Components:
    """What a run is made of; `run.py` builds it from the config."""

    cfg: Config
    trainer: Trainer
    pool: RolloutPool
    collector: Collector
    rollouts: Rollouts
    sync: WeightSync
    tracker: Tracker
    watcher: Watcher
    decisions: Decisions
    checkpoints: Checkpoints
    should_stop: Callable[[], bool]


def train(c: Components, first_step: int) -> State:
    """Run steps [first_step, cfg.steps); returns completed, interrupted or stopped. The last checkpoint is saved always."""
    step, saved = first_step, first_step or -1  # a run that goes on begins at a checkpoint
    outcome: State = "completed"
    while step < c.cfg.steps:
        started, before = time.perf_counter(), c.pool.state()
        try:
            metrics = _step(c, step)
        except Interrupted:
            c.pool.load_state(before)  # the step is done again from its beginning
            outcome = "interrupted"
            break
        metrics["perf/step_time"] = time.perf_counter() - started
        alerts = c.watcher.check(step, metrics)
        c.tracker.log(step, metrics)
        if skipped := metrics["train/nan_steps"]:
            message = f"step {step + 1}: {skipped:g} update(s) skipped, loss or gradient was not finite"
            c.tracker.event("warning", message, {"step": step})
        for alert in alerts:
            c.tracker.event(f"watch_{alert.action}", alert.message, {"step": step, "rule": alert.rule})
        step += 1
        if c.cfg.checkpoint.interval_steps and step % c.cfg.checkpoint.interval_steps == 0:
            _save(c, step)
            saved = step
        c.checkpoints.poll()
        if any(alert.action == "stop" for alert in alerts):
            outcome = "stopped"
            break
        if c.should_stop():
            outcome = "interrupted"
            break
    if outcome == "completed" and (unseen := c.watcher.unseen()):
        c.tracker.event("warning", f"watch rules that never saw their metric: {', '.join(unseen)}", {})
    if saved != step:
        _save(c, step)
    c.checkpoints.join()
    return outcome


def _save(c: Components, step: int) -> None:
    """Checkpoint after this many finished steps."""
    kept = continuation.remembered(c.cfg, c.collector, step)
    c.checkpoints.save(step, {"pool": c.pool.state(), "watch": c.watcher.state(), **kept}, c.rollouts.save)


def tell_notices(pool: RolloutPool, tracker: Tracker, step: int | None = None) -> None:
    """What happened to the engines since the last call, as events."""
    for notice in pool.notices():
        tracker.event("engine", notice, {} if step is None else {"step": step})


def _step(c: Components, step: int) -> dict[str, float]:
    """The step's metrics. Whatever takes time stands under a clock of runner.tracking.base.STEP_PARTS."""
    metrics: dict[str, float] = {}
    clock = _Clock(metrics)
    with clock("rollout"):
        generated = c.rollouts.take(step)
    with clock("other"):
        rollout = generated.rollout
        metrics |= rollout.metrics | generated.pool_metrics
        batch = _make_batch(c.cfg, rollout)
    if _decomposes(c.cfg, step):
        with clock("decompose"):
            metrics |= _decompose(c, batch, generated)
    if c.rollouts.depth and not c.rollouts.over_updates and _decomposes(c.cfg, step + 1):
        with clock("decompose"):
            _keep_trainer_logprobs(c, step + 1)
    with clock("train"):
        update = c.trainer.step(batch)
    with clock("other"):
        metrics |= update.metrics | mismatch.metrics(batch.samples, update)
    if c.rollouts.depth:
        metrics["perf/generation_time"] = generated.seconds
        with clock("rollout"):
            c.rollouts.settle()
    with clock("sync", measured=False):  # it says itself what of it is loading and what the probe
        metrics |= c.sync()
    with clock("other"):
        rows = samples.rows(batch, update, c.collector.decode)
        c.tracker.log_samples(step, rows, samples.pictures(batch))
    if c.cfg.evaluation.interval_steps and (step + 1) % c.cfg.evaluation.interval_steps == 0:
        with clock("eval"):
            metrics |= evaluate(c.cfg, c.collector, step)
    with clock("other"):
        if decision := c.decisions.at_end_of(step, c.pool):
            message = f"after step {step + 1}: {decision['summary']}"
            c.tracker.event(POOL_DECISION, message, {"step": step, "decision": decision})
        tell_notices(c.pool, c.tracker, step)
        c.tracker.log_timeline(step, [*clock.spans, *_trainer_spans(update), *served(rollout.all_samples)])
    metrics["perf/tokens_per_sec"] = batch.num_tokens / (metrics["perf/rollout_time"] + metrics["perf/train_time"])
    return metrics


def _decomposes(cfg: Config, step: int) -> bool:
    interval = cfg.mismatch.decompose_interval_steps
    return bool(interval) and step % interval == 0 and step < cfg.steps


def _decompose(c: Components, batch: Batch, generated: Generated) -> dict[str, float]:
    count = c.cfg.mismatch.decompose_samples
    if c.rollouts.over_updates:
        return mismatch.decompose(c.trainer, batch, count, engine_now=mismatch.engine_logprobs(c.pool, batch, count))
    if c.rollouts.depth:
        return mismatch.decompose(c.trainer, batch, count, generated.trainer_logprobs or [])
    return mismatch.decompose(c.trainer, batch, count)


def _keep_trainer_logprobs(c: Components, step: int) -> None:
    """The pending rollout will be compared with weights that are gone by then: what they say is kept now."""
    if (waiting := c.rollouts.waiting(step)) is not None:
        batch = _make_batch(c.cfg, waiting.rollout)
        waiting.trainer_logprobs = mismatch.generation_logprobs(c.trainer, batch, c.cfg.mismatch.decompose_samples)


def _make_batch(cfg: Config, rollout: Rollout) -> Batch:
    advantages = compute_advantages(cfg.algorithm, [group.samples for group in rollout.groups])
    return Batch(samples=rollout.samples, advantages=advantages, temperature=cfg.rollout.sampling.temperature)


def _trainer_spans(update: StepResult) -> list[Span]:
    return [Span(f"trainer rank {rank}", "update", begin, end) for rank, (begin, end) in enumerate(update.busy)]


class _Clock:
    """Adds the seconds of each phase of a step to `metrics`, and keeps when its pieces began and ended."""

    def __init__(self, metrics: dict[str, float]) -> None:
        self.metrics = metrics
        self.spans: list[Span] = []

    @contextmanager
    def __call__(self, phase: str, *, measured: bool = True) -> Iterator[None]:
        """A part of a step may come in two pieces. Without `measured` its seconds are no metric."""
        began, started = time.time(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.spans.append(Span("driver", phase, began, began + seconds))
        if measured:
            name = f"perf/{phase}_time"
            self.metrics[name] = self.metrics.get(name, 0.0) + seconds
