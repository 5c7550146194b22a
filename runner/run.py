"""`python -m runner`: check the machine, open the run's folder, build the components, run the loop, close everything."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from hydra.utils import get_class

from runner import checkpoint, preflight
from runner.decisions import Decisions
from runner.errors import UserError
from runner.folder import RunFolder, open_folder
from runner.loop import Components, train
from runner.models.build import load_tokenizer
from runner.rollout.collect import Collector, Interrupted
from runner.schema import Config
from runner.sync import WeightSync
from runner.tasks.protocol import Task
from runner.tracking.tracker import Tracker, build_tracker
from runner.warm_start import warm_start
from runner.watch import Watcher


class StopSignal:
    """Ctrl-C once: finish what must not be torn, save, say how to resume. Twice: leave at once."""

    def __init__(self) -> None:
        self.received = False

    def __call__(self) -> bool:
        return self.received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        print("\nstopping after the current piece of work; press Ctrl-C again to leave at once", file=sys.stderr, flush=True)

    @contextmanager
    def installed(self) -> Iterator[StopSignal]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def main(cfg: Config, overrides: list[str]) -> int:
    """Run one experiment; returns the exit code: 0 completed, 1 failed or stopped by a rule, 130 interrupted."""
    preflight.check(cfg)
    folder = open_folder(cfg, overrides)
    with StopSignal().installed() as stop:
        first_step = checkpoint.read_state(folder.resumed_from)["step"] if folder.resumed_from else 0
        tracker = build_tracker(cfg, folder.path, first_step=first_step)
        outcome, message = "failed", ""
        started = time.perf_counter()
        try:
            outcome = _run(cfg, folder, tracker, stop)
            message = _how_it_ended(outcome, folder.path)
        except Interrupted:
            outcome, message = "interrupted", "interrupted before the first step; nothing to resume"
        except KeyboardInterrupt:
            outcome, message = "interrupted", _how_it_ended("interrupted", folder.path)
        except UserError as error:
            message = str(error)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            raise
        finally:
            tracker.finish(outcome, {"seconds": time.perf_counter() - started}, message)
    return {"completed": 0, "interrupted": 130}.get(outcome, 1)


def _run(cfg: Config, folder: RunFolder, tracker: Tracker, stop: StopSignal) -> str:
    _seed_everything(cfg.seed)
    tokenizer = load_tokenizer(cfg.model)
    task: Task = get_class(cfg.task._target_)(cfg.task, tokenizer)
    stop_ids = (tokenizer.eos_token_id,)
    trainer = get_class(cfg.trainer._target_)(cfg)
    pool = get_class(cfg.rollout._target_)(cfg)
    try:

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        collector = Collector(cfg, task, pool, decode, stop_ids, stop, warn=partial(tracker.event, "warning"))
        sync = WeightSync(trainer, pool, _probe(cfg, task), tracker)
        watcher = Watcher(cfg)
        first_step = 0
        if folder.resumed_from:
            state = checkpoint.read_state(folder.resumed_from)
            trainer.load(folder.resumed_from / "trainer")
            pool.load_state(state["pool"])
            watcher.load_state(state["watch"])
            first_step = state["step"]
        elif cfg.warm_start.enabled:
            untouched = pool.state()
            warm_start(cfg, trainer, collector, sync, tokenizer, tracker, stop)
            pool.load_state(untouched)  # a cached warm start measures nothing

        def save(step: int) -> None:
            state = {"pool": pool.state(), "watch": watcher.state()}
            checkpoint.save(folder.path, step, state, trainer.save, cfg.checkpoint.keep)

        sync()
        decisions = Decisions(folder.path, first_step)
        parts = Components(cfg, trainer, pool, collector, sync, tracker, watcher, decisions, save=save, should_stop=stop)
        return train(parts, first_step)
    finally:
        pool.close()
        trainer.close()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _probe(cfg: Config, task: Task) -> list[torch.Tensor]:
    prompts = task.eval_prompts(cfg.mismatch.probe_sequences) if cfg.mismatch.probe_sequences else []
    return [torch.tensor(prompt.tokens) for prompt in prompts]


def _how_it_ended(outcome: str, folder: Path) -> str:
    saved = checkpoint.complete(folder)
    if outcome == "interrupted" and saved:
        return f"interrupted; checkpoint {saved[-1].name} is complete. Continue with: python -m runner resume={folder}"
    if outcome == "stopped":
        return f"stopped by a watch rule; continue with: python -m runner resume={folder} (and what you change)"
    return outcome
