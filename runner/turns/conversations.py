"""Many conversations at one time over one pool: an event loop for the user's functions, a feed for the engines.

The engines run in the caller's thread or behind it; the functions run in a thread with an event loop. What a function asks for
goes into the feed, what an engine answers comes back to the function that waits for it.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch

from runner.config.schema import Config
from runner.data import Request, Sample, SamplingParams, Status, request_seed
from runner.errors import UserError, UserErrors, told
from runner.rollout.feed import Feed
from runner.rollout.protocol import RolloutPool
from runner.tasks.protocol import Prompt
from runner.turns.codec import Codec
from runner.turns.context import Context, Engine, Interrupted, interrupt
from runner.turns.failure import Failed
from runner.turns.transcript import checked

BLOCKED_SECONDS = 30.0  # a function that holds the event loop for so long is interrupted; all others wait meanwhile


Enough = Callable[[str, int, list[Sample]], bool]


class _Stop(Exception):
    """There is enough."""


@dataclass(frozen=True)
class Asked:
    """One rollout's part in all of its conversations."""

    sampling: SamplingParams
    step: int
    capture_routes: bool
    evaluating: bool


class Conversations:
    """`run` returns the samples of all conversations of a rollout."""

    def __init__(self, cfg: Config, task: Any, codec: Codec, concurrency: int, lockstep: bool) -> None:
        """`concurrency`: conversations at one time; `lockstep`: the engine's results depend on who shares a batch.

        UserError where the function or the environment cannot be had.
        """
        section = cfg.task.rollout
        self.cfg, self.task, self.codec, self.section = cfg, task, codec, section
        self.concurrency = concurrency
        self.wait_seconds = section.lockstep_seconds if lockstep else 0.0
        self.function, self.environment = user_code(cfg)

    def run(
        self,
        pool: RolloutPool,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        asked: Asked,
        watch: Callable[[], None],
        enough: Enough | None = None,
    ) -> list[Sample]:
        """Samples in the order of prompts and numbers; failed ones have no reward and say why. `watch` may raise to stop.

        `enough` is told (prompt, number, samples) of every conversation that is over, and whether it is the last that is waited
        for: all others are aborted then.
        """
        jobs = [(prompt, index) for prompt in prompts for index in range(samples_per_prompt)]
        return _Rollout(self, jobs, asked, enough).run(pool, watch)


class _Rollout:
    """The conversations of one rollout. Methods with `loop:` run in the event loop's thread."""

    def __init__(self, owner: Conversations, jobs: list[tuple[Prompt, int]], asked: Asked, enough: Enough | None) -> None:
        self.owner, self.jobs, self.asked, self.enough = owner, jobs, asked, enough
        self.over: SimpleQueue[int] = SimpleQueue()  # places whose results nobody has looked at
        self.stopped = False
        self.feed = Feed(owner.wait_seconds)
        self.waiting: dict[int, tuple[int, Request, asyncio.Future[Sample]]] = {}  # ticket -> (place, request, who waits)
        self.results: dict[int, list[Sample]] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.tickets = 0
        self.next_job = 0
        self.mistake: BaseException | None = None
        self.beat = time.monotonic()
        self.blocked_since: float | None = None
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="conversations", daemon=True)

    def run(self, pool: RolloutPool, watch: Callable[[], None]) -> list[Sample]:
        def look() -> None:
            watch()
            self._interrupt_a_blocked_loop()
            self._count()

        self.feed.watch = look
        self.thread.start()
        samples = pool.generate(self.feed)
        try:
            self.loop.call_soon_threadsafe(self._start)
            for sample in samples:
                look()
                self._deliver(sample)
            self._count()
        except _Stop:
            self.stopped = True
        finally:
            if close := getattr(samples, "close", None):
                close()
            self._close()
        if self.mistake is not None:
            raise self.mistake
        return [sample for place in range(len(self.jobs)) for sample in self.results.get(place, ())]

    def _count(self) -> None:
        """Raises _Stop when what is over is enough."""
        while self.enough is not None and self.mistake is None and not self.over.empty():
            place = self.over.get()
            prompt, index = self.jobs[place]
            if self.enough(prompt.prompt_id, index, self.results[place]):
                raise _Stop

    def _deliver(self, sample: Sample) -> None:
        place, request, future = self.waiting.pop(sample.sample_index)
        self.feed.delivered(place)
        answer = replace(sample, sample_index=request.sample_index)

        def settle() -> None:
            if not future.done():
                future.set_result(answer)

        self.loop.call_soon_threadsafe(settle)

    def _close(self) -> None:
        async def cancel() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0) if tasks else None

        if self.tasks or self.mistake is not None:
            asyncio.run_coroutine_threadsafe(cancel(), self.loop)
            time.sleep(0)
        self.loop.call_soon_threadsafe(self._stop_when_done)
        self.thread.join(timeout=5.0)  # a function that neither ends nor can be interrupted keeps its daemon thread
        if not self.thread.is_alive():
            self.loop.close()

    def _interrupt_a_blocked_loop(self) -> None:
        """Found twice, a second apart: after the whole process stood still, the loop gets time to beat."""
        now = time.monotonic()
        if now - self.beat < BLOCKED_SECONDS:
            self.blocked_since = None
        elif self.blocked_since is None:
            self.blocked_since = now
        elif now - self.blocked_since > 1.0:
            self.blocked_since = None
            self.beat = now
            interrupt(self.thread)

    # -- loop: ---------------------------------------------------------------------------------------------------------

    def _stop_when_done(self) -> None:
        if not asyncio.all_tasks(self.loop):
            self.loop.stop()
        else:
            self.loop.call_later(0.01, self._stop_when_done)

    def _start(self) -> None:
        self._heart()
        for _ in range(min(self.owner.concurrency, len(self.jobs))):
            self._begin()
        if not self.jobs:
            self.feed.close()

    def _heart(self) -> None:
        self.beat = time.monotonic()
        self.loop.call_later(0.2, self._heart)

    def _begin(self) -> None:
        place = self.next_job
        self.next_job += 1
        self.feed.begin(place)
        if self.next_job == len(self.jobs):
            self.feed.close()
        task = self.loop.create_task(self._converse(place))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _converse(self, place: int) -> None:
        """One conversation from its beginning to its result."""
        prompt, index = self.jobs[place]
        owner = self.owner
        context = Context(
            sample_index=index,
            seed=request_seed(owner.cfg.seed, self.asked.step, prompt.prompt_id, index),
            max_turns=owner.section.max_turns,
            max_tokens=self.asked.sampling.max_response_tokens,
            max_observation_tokens=owner.section.max_observation_tokens,
            arguments=dict(owner.section.arguments),
            environment_class=owner.environment,
            task=owner.task,
            codec=owner.codec,
            evaluating=self.asked.evaluating,
        )
        engine = Engine(
            ask=lambda request: self._ask(place, request),
            sampling=self.asked.sampling,
            capture_routes=self.asked.capture_routes,
            context_tokens=owner.cfg.model.max_context_tokens,
            max_turn_tokens=owner.section.max_turn_tokens,
            stop=tuple(owner.section.stop),
        )
        try:
            self.results[place] = await self._result(engine, prompt, context)
        except Failed as failure:
            self.results[place] = [_failed(prompt, index, failure, context)]
        except (UserError, asyncio.CancelledError) as error:
            if not self.stopped:
                self.mistake = self.mistake or error
            self.results[place] = []
        if self.next_job < len(self.jobs) and self.mistake is None and not self.stopped:
            self._begin()
        elif self.mistake is not None or self.stopped:
            self.feed.close()
        for talk in context.started:
            self.feed.forget(talk.key)
        self.over.put(place)
        self.feed.end(place)

    async def _result(self, engine: Engine, prompt: Prompt, context: Context) -> list[Sample]:
        seconds = self.owner.section.timeout_seconds
        task = self.loop.create_task(_called(self.owner.function, engine, prompt, context))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            raise Failed("timeout", f"not done within {seconds:g} s")
        try:
            result = task.result()
        except (Failed, UserError):
            raise
        except Interrupted:
            raise Failed("timeout", f"the function held the event loop for {BLOCKED_SECONDS:g} s without an await") from None
        except asyncio.CancelledError:
            raise Failed("rollout", "the function cancelled itself") from None
        except BaseException as error:
            raise Failed("rollout", f"the function raised {told(error, where=True)}") from error
        return checked(result, prompt, context.sample_index, self.asked.capture_routes)

    def _ask(self, place: int, request: Request) -> Awaitable[Sample]:
        """The engine's answer; requests are told apart by a number of their own, because a conversation may have several."""
        future: asyncio.Future[Sample] = self.loop.create_future()
        ticket, self.tickets = self.tickets, self.tickets + 1
        self.waiting[ticket] = (place, request, future)
        self.feed.put(replace(request, sample_index=ticket), place)
        return future


async def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    result = function(*arguments)
    return await result if inspect.isawaitable(result) else result


def _failed(prompt: Prompt, index: int, failure: Failed, context: Context) -> Sample:
    """What is left of a conversation that failed: a reason, and its turns for a reader. Nothing to train on."""
    turns = [turn for talk in context.started for turn in talk.turns]
    return Sample(
        prompt_id=prompt.prompt_id,
        sample_index=index,
        tokens=torch.tensor(prompt.tokens, dtype=torch.int64),
        response_length=0,
        loss_mask=torch.zeros(0, dtype=torch.bool),
        rollout_logprobs=torch.zeros(0),
        status=Status.failed,
        finish_reason=failure.reason,
        info={"failed": failure.kind, "turns": turns, "prompt": prompt.text, "text": ""},
    )


def user_code(cfg: Config) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """(the rollout function, the class of its environments) that task.rollout names. UserError where one cannot be imported,
    or is none."""
    section = cfg.task.rollout
    assert section._target_ is not None
    function = named(section._target_, "task.rollout._target_")
    if not callable(function):
        raise UserError(
            f"{section._target_} is no function", key="task.rollout._target_", fix="async def rollout(engine, prompt, context)"
        )
    if problem := _unfit(function, (None, None, None), {}):
        raise UserError(
            f"{section._target_} is not called with (engine, prompt, context): {problem}",
            key="task.rollout._target_",
            fix="async def rollout(engine, prompt, context)",
        )
    environment = named(section.environment, "task.rollout.environment") if section.environment else None
    if environment is not None and not callable(environment):
        raise UserError(f"{section.environment} is no class", key="task.rollout.environment", fix="a class with reset and step")
    if environment is not None and (problem := _unfit(environment, (), dict(section.arguments))):
        raise UserError(
            f"{section.environment} does not take these arguments: {problem}",
            key="task.rollout.arguments",
            fix="+task.rollout.arguments.NAME=VALUE, for each that its __init__ wants",
        )
    if environment is not None and isinstance(inspect.getattr_static(environment, "check_arguments", None), staticmethod):
        found = list(environment.check_arguments(**dict(section.arguments)))
        if found:
            raise UserErrors(found)
    return function, environment


def _unfit(called: Callable[..., Any], arguments: tuple[Any, ...], named_arguments: dict[str, Any]) -> str:
    """Why it cannot be called so; "" where it can, or where nobody can tell before."""
    try:
        inspect.signature(called).bind(*arguments, **named_arguments)
    except TypeError as error:
        return str(error)
    except ValueError:  # written in C, without a signature
        return ""
    return ""


def named(path: str, key: str) -> Any:
    """What `package.module.name` is. UserError where there is no such thing, or where importing it raises."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        fix = "package.module.name of something on Python's path; the folder you start in is, PYTHONPATH names others"
        raise UserError(f"{path} cannot be imported: {told(error, where=True)}", key=key, fix=fix) from None


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means per conversation of turns, of tokens that are not the model's, and of `tool_calls` and `tool_errors` where
    environments note them; failures by kind. Over everything that was generated."""
    failures = Counter(sample.info["failed"] for sample in samples if "failed" in sample.info)
    found = {f"rollout/failed_{kind}": float(count) for kind, count in sorted(failures.items())}
    found["rollout/failed"] = float(sum(failures.values()))
    whole = [sample for sample in samples if "failed" not in sample.info]
    if whole:
        turns = [sum(turn["by"] == "model" for turn in _turns(sample)) for sample in whole]
        found["rollout/turns/mean"] = sum(turns) / len(turns)
        found["rollout/turns/max"] = float(max(turns))
        notes = [[turn.get("notes", {}) for turn in _turns(sample)] for sample in whole]
        for name in ("tool_calls", "tool_errors"):
            counts = [[note[name] for note in rows if isinstance(note.get(name), int)] for rows in notes]
            if any(counts):
                found[f"rollout/{name}"] = sum(map(sum, counts)) / len(whole)
        found["rollout/observation_tokens"] = sum(int((~sample.loss_mask).sum()) for sample in whole) / len(whole)
    return found


def _turns(sample: Sample) -> Iterator[dict[str, Any]]:
    yield from sample.info.get("turns", ())
