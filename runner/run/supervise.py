"""`python -m runner`: check the machine, open the run's folder, build the components, run the loop, close everything."""

from __future__ import annotations

import errno
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from hydra.utils import get_class
from transformers import PreTrainedTokenizerBase

from runner.cluster import opened
from runner.config import preflight
from runner.config.option import option_of, shares_gpus, trainer_layout
from runner.config.overrides import command, typed
from runner.config.schema import Config
from runner.errors import Failure, UserError, UserErrors
from runner.models.build import load_tokenizer
from runner.models.ends import KEY, EndTokens, end_tokens, unlisted_turn_end
from runner.models.images import image_processor
from runner.precision.plan import PrecisionPlan
from runner.rollout.audit import audit_pool
from runner.rollout.protocol import RolloutPool
from runner.run import checkpoint, continuation, schedules
from runner.run.collect import Collector, Interrupted
from runner.run.colocation import TimeShared
from runner.run.decisions import Decisions
from runner.run.folder import RunFolder, open_folder
from runner.run.loop import Components, tell_notices, train
from runner.run.schedules import Rollouts
from runner.run.sync import WeightSync
from runner.run.warm_start import warm_start
from runner.run.watch import Watcher
from runner.tasks import parts
from runner.tasks.protocol import Task
from runner.tracking.base import State, Tracker
from runner.tracking.tracker import CompositeTracker, LateTracker, build_tracker
from runner.trainer.optimizer import unfinished_warmup
from runner.trainer.protocol import Trainer, TrainerLost
from runner.turns.conversations import user_code

RESTART = "trainer_restart"  # kind of the event


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
    """Run one experiment; returns the exit code: 0 completed, 1 failed or stopped by a rule, 130 interrupted.

    Raises UserError (exit code 2) for a mistake of the user. One that refuses a resume leaves the run as it was.
    """
    preflight.check(cfg)
    tokenizer = load_tokenizer(cfg.model)
    ends = end_tokens(cfg.model, tokenizer, cfg.rollout.sampling.stop_token_ids)
    if cfg.task.rollout._target_ is not None:
        user_code(cfg)
    if problems := list(parts.check(cfg.task.rewards)):
        raise UserErrors(problems)
    with (
        opened(cfg),
        open_folder(cfg, overrides) as folder,
        StopSignal().installed() as stop,
    ):  # Ray takes SIGTERM: ours comes after
        first_step = checkpoint.read_state(folder.resumed_from)["step"] if folder.resumed_from else 0
        if first_step > cfg.steps:
            raise UserError(
                f"{folder.path.name} has {first_step} steps already: {cfg.steps} leave nothing to do",
                key="steps",
                fix=f"steps={first_step + 1} or more",
            )

        def begin() -> CompositeTracker:
            folder.keep_overrides(overrides)
            opened = build_tracker(cfg, folder.path, first_step=first_step, check=folder.check)
            for note in (*folder.notes, *unfinished_warmup(cfg), *schedules.notes(cfg)):
                opened.event("warning", note)
            _say_where_samples_end(ends, tokenizer, opened)
            return opened

        tracker = LateTracker(begin)
        if not folder.resumed_from:
            tracker.open()
        return _recorded(partial(_supervise, cfg, folder, tokenizer, ends, tracker, stop), folder, tracker)


def _recorded(run: Callable[[], State], folder: RunFolder, tracker: LateTracker) -> int:
    """The exit code of `run`; how it ended is said and written down. What the user has to mend is raised."""
    outcome: State = "failed"
    message = ""
    mistake: UserError | None = None
    started = time.perf_counter()
    try:
        outcome = run()
        message = _how_it_ended(outcome, folder.path)
    except Interrupted:
        outcome, message = "interrupted", "interrupted before the first step; nothing to resume"
    except KeyboardInterrupt:
        outcome, message = "interrupted", _how_it_ended("interrupted", folder.path)
    except UserError as error:
        if tracker.is_open:
            _advise(error, folder.path)
        message = str(error)
        mistake = None if isinstance(error, Failure) else error
    except OSError as error:
        message = f"{type(error).__name__}: {error}"
        if not _lost_its_disk(error, folder.path):
            raise
        message = str(_advise(Failure(f"cannot write the run's files: {error}", key="outputs_dir"), folder.path))
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        raise
    finally:
        ended = _finish(tracker, outcome, {"seconds": time.perf_counter() - started}, message)
    if mistake is not None:
        raise mistake
    return {"completed": 0, "interrupted": 130}.get(outcome, 1) if ended else 1


def _finish(tracker: LateTracker, outcome: State, summary: dict[str, float], message: str) -> bool:
    """Whether the end could be written down; said on stderr where not, so that it never hides why the run ended."""
    if not tracker.is_open:
        if message and outcome == "interrupted":
            print(message, file=sys.stderr)
        return True
    try:
        tracker.finish(outcome, summary, message)
    except Exception as error:
        print(f"error: how the run ended could not be written down: {error}", file=sys.stderr)
        return False
    return True


def _lost_its_disk(error: OSError, run_dir: Path) -> bool:
    """Whether a disk filled up, turned read-only or went away, or a file of the run did: not a fault of ours."""
    places = [str(name) for name in (error.filename, error.filename2) if name is not None]
    inside = any(Path(place).resolve().is_relative_to(run_dir.resolve()) for place in places)
    return inside or error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENODEV)


def _advise(error: UserError, run_dir: Path) -> UserError:
    """`error`, and how to go on from what there is."""
    saved = checkpoint.complete(run_dir)
    if saved:
        advice = f"{command(typed('resume', str(run_dir)))} goes on from {saved[-1].name}"
    else:
        advice = "start the run again: there is no checkpoint to resume from"
    error.fix = f"{error.fix}; then {advice}" if error.fix else advice
    return error


def _supervise(
    cfg: Config, folder: RunFolder, tokenizer: PreTrainedTokenizerBase, ends: EndTokens, tracker: LateTracker, stop: StopSignal
) -> State:
    """The run, begun again from its last checkpoint when the trainer is lost, at most `trainer.max_restarts` times.

    The engines stay: the first sync of an attempt brings them the weights of its checkpoint.
    """
    task = _build_task(cfg, tokenizer)
    continuation.keep_schedule(cfg, folder.resumed_from)
    trainer = _build_trainer(cfg, folder.path)
    if shares_gpus(cfg):
        trainer.sleep()  # the engines fill the GPUs when they start
    pool: RolloutPool = get_class(cfg.rollout._target_)(cfg, folder.path)
    shared = TimeShared(trainer, pool) if shares_gpus(cfg) else None
    if shared:
        trainer, pool = shared.trainer, shared.pool
    untouched = pool.state()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ends.without_last(ids), skip_special_tokens=True))

    collector = Collector(cfg, task, pool, decode, ends.ids, stop, warn=partial(tracker.event, "warning"), tokenizer=tokenizer)
    begin, restarts = folder.resumed_from, 0
    try:
        audit_pool(PrecisionPlan.build(cfg.model, cfg.precision, "rollout"), pool.describe())
        while True:
            try:
                pool.load_state(untouched)
                outcome = _run(cfg, folder, begin, trainer, collector, tokenizer, ends, tracker, stop)
                folder.check()
                return outcome
            except TrainerLost as error:
                if not tracker.is_open:  # it never took up the checkpoint of a resume
                    raise
                restarts += 1
                begin = _restart_point(cfg, folder.path, error, restarts, tracker)
            trainer.close()
            if shared:
                shared.make_room()
            trainer = _build_trainer(cfg, folder.path)
            if shared:
                trainer = shared.replace_trainer(trainer)
    finally:
        if tracker.is_open:
            with suppress(UserError):  # why the run ends is known already
                tell_notices(pool, tracker)
        pool.close()
        trainer.close()


def _say_where_samples_end(ends: EndTokens, tokenizer: PreTrainedTokenizerBase, tracker: Tracker) -> None:
    tracker.event(
        "end_tokens", ends.summary(tokenizer), {"ids": list(ends.ids), "sources": {k: list(v) for k, v in ends.sources}}
    )
    if ends.unused:
        tracker.event("warning", f"end ids that the model has no embeddings for are left out: {list(ends.unused)}", {})
    if token := unlisted_turn_end(tokenizer, ends):
        index = tokenizer.convert_tokens_to_ids(token)
        message = f"the chat template closes a turn with {token}, which does not end a sample; {KEY}=[{index}] adds it"
        tracker.event("warning", message, {})


def _build_task(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Task:
    images = [image_processor(cfg.model, tokenizer)] if option_of(cfg.task).shows_images else []
    task: Task = get_class(cfg.task._target_)(cfg.task, tokenizer, *images)
    return task


def _build_trainer(cfg: Config, run_dir: Path) -> Trainer:
    _seed_everything(cfg.seed)
    trainer: Trainer = get_class(cfg.trainer._target_)(cfg, run_dir)
    return trainer


def _restart_point(cfg: Config, run_dir: Path, error: TrainerLost, restarts: int, tracker: Tracker) -> Path | None:
    """The checkpoint to go on from, None for the run's beginning; raises when there have been restarts enough."""
    allowed = trainer_layout(cfg).max_restarts
    if restarts > allowed:
        how_often = f"after {restarts - 1} of {allowed} restarts (trainer.max_restarts): " if allowed else ""
        raise TrainerLost(f"{how_often}{error.problem}", key=error.key, fix=error.fix) from error
    begin = checkpoint.latest(run_dir, partial(tracker.event, "warning")) if checkpoint.complete(run_dir) else None
    where = f"checkpoint {begin.name}" if begin else "the run's beginning: there is no checkpoint yet"
    message = f"restart {restarts} of {allowed} from {where}, because {error.problem}"
    tracker.event(RESTART, message, {"restarts": restarts, "from": begin.name if begin else None})
    tracker.rewind(checkpoint.read_state(begin)["step"] if begin else 0)
    return begin


def _run(
    cfg: Config,
    folder: RunFolder,
    begin: Path | None,
    trainer: Trainer,
    collector: Collector,
    tokenizer: PreTrainedTokenizerBase,
    ends: EndTokens,
    tracker: LateTracker,
    stop: StopSignal,
) -> State:
    """Steps from checkpoint `begin` on, or from a warm start; returns the outcome. A resume is accepted, and the tracker opened,
    when its checkpoint has been taken up."""
    pool, run_dir = collector.pool, folder.path
    probe = collector.task.eval_prompts(cfg.mismatch.probe_sequences) if cfg.mismatch.probe_sequences else []
    sync = WeightSync(trainer, pool, [torch.tensor(p.tokens) for p in probe], tracker, [p.images for p in probe])
    watcher = Watcher(cfg)
    rollouts = Rollouts(cfg, collector)
    first_step = 0
    state = checkpoint.read_state(begin) if begin else None
    notes = list(continuation.go_on(cfg, collector, state))
    if begin and state:
        trainer.load(begin / "trainer")
        notes += rollouts.load(begin, continuation.changed_keys(cfg, state))
        pool.load_state(state["pool"])
        watcher.load_state(state["watch"])
        first_step = state["step"]
        tracker.open()
        checkpoint.set_aside(run_dir, after=begin)
        for note in notes:
            tracker.event("warning", note)
    elif cfg.warm_start.enabled:
        untouched = pool.state()
        warm_start(cfg, trainer, collector, sync, tokenizer, ends.last, tracker, stop)
        pool.load_state(untouched)  # a cached warm start measures nothing

    sync()
    decisions = Decisions(run_dir, first_step)
    checkpoints = checkpoint.Checkpoints(run_dir, trainer.begin_save, cfg.checkpoint.keep)
    components = Components(
        cfg, trainer, pool, collector, rollouts, sync, tracker, watcher, decisions, checkpoints, should_stop=stop
    )
    try:
        return train(components, first_step)
    except TrainerLost:
        rollouts.close()
        raise
    except UserError:
        with suppress(UserError):
            checkpoints.join()  # what was being written is worth keeping, whatever stopped the run
        raise


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _how_it_ended(outcome: State, folder: Path) -> str:
    saved, again = checkpoint.complete(folder), command(typed("resume", str(folder)))
    if outcome == "interrupted" and saved:
        return f"interrupted; checkpoint {saved[-1].name} is complete. Continue with: {again}"
    if outcome == "stopped":
        return f"stopped by a watch rule; continue with: {again} (and what you change)"
    return outcome
