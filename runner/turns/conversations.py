"""Many conversations at one time over one pool: an event loop for the user's functions, a feed for the engines.

The engines run in the caller's thread or behind it; the functions run in a thread with an event loop. What a function asks for
goes into the feed, what an engine answers comes back to the function that waits for it.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch

from runner import foreign
from runner.config.schema import Config
from runner.data import Request, Sample, SamplingParams, Status, request_seed
from runner.errors import UserError, UserErrors, told
from runner.foreign import Interrupted, UserLoop
from runner.rollout.feed import Feed
from runner.rollout.protocol import RolloutPool
from runner.tasks.protocol import Prompt
from runner.turns.codec import Codec
from runner.turns.context import Context, Engine
from runner.turns.environment import drive
from runner.turns.failure import Failed
from runner.turns.returned import checked

MAX_HELD = 4  # times that conversations of a rollout may hold their event loop; then what is not over counts as failed
MAX_NOTED = 10**6  # tool calls of a turn, as an environment notes them; more is rubbish


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
        self.waiting: dict[int, tuple[int, Request, asyncio.Future[Sample]]] = {}  # ticket -> (feed's place, request, who waits)
        self.results: dict[int, list[Sample]] = {}
        self.open: dict[int, Context] = {}  # conversations under way, by place
        self.tickets = 0
        self.next_job = 0
        self.mistake: BaseException | None = None
        self.loop = UserLoop("conversations")
        self.loops = 0  # that were lost before this one
        self.held = 0  # times that a conversation held the loop
        self.lock = threading.RLock()  # of a conversation's end against the loss of its loop

    def run(self, pool: RolloutPool, watch: Callable[[], None]) -> list[Sample]:
        def look() -> None:
            watch()
            self._look_at_the_loop()
            self._count()

        self.feed.watch = look
        samples = pool.generate(self.feed)
        try:
            self.loop.call(self._start)
            for sample in samples:
                look()
                self._deliver(sample)
            self._count()
        except _Stop:
            self.stopped = True
        finally:
            if close := getattr(samples, "close", None):
                close()
            self.loop.close()
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

        future.get_loop().call_soon_threadsafe(settle)

    def _look_at_the_loop(self) -> None:
        """A conversation that holds the loop for good costs itself: those beside it begin anew in another loop. Raises _Stop when
        that happened too often; what is not over by then has failed."""
        found = self.loop.look()
        if found is None:
            return
        self.held += found == "interrupted"
        given_up = self.held >= MAX_HELD if found == "lost" else self.held > MAX_HELD
        if (found == "interrupted" and not given_up) or not self.lock.acquire(timeout=1.0):  # it has just come back
            return
        try:
            self._leave_the_loop(given_up)
        finally:
            self.lock.release()

    def _leave_the_loop(self, given_up: bool) -> None:
        holder, line = self.loop.holder()
        reason = f"{_held()}, at {line}"
        begun = sorted(self.open)
        lost = [place for place in begun if holder in (place, None)]
        if given_up:
            reason = f"not done when {self.held} conversations had held the event loop without an await, the last at {line}"
            lost = [place for place in range(len(self.jobs)) if place not in self.results]
        for place in begun:
            self._end(place)
        for place in lost:
            prompt, index = self.jobs[place]
            self.results[place] = [_failed(prompt, index, Failed("timeout", reason), None)]
            self.over.put(place)
        self.loop.abandon()
        if given_up:
            raise _Stop
        self.loop, self.loops = UserLoop("conversations"), self.loops + 1
        for place in begun:
            if place not in lost:
                self._begin(place)
        for _ in lost:
            self.loop.call(self._begin_next)

    def _end(self, place: int) -> None:
        """Nothing more comes of a conversation that was under way."""
        for talk in self.open.pop(place).started:
            self.feed.forget(talk.key)
        self.feed.end(self._in_feed(place))

    def _in_feed(self, place: int) -> int:
        """A conversation that begins anew is another one to the feed: answers to its first life may still come."""
        return place + self.loops * len(self.jobs)

    # -- loop: ---------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for _ in range(min(self.owner.concurrency, len(self.jobs))):
            self._begin_next()
        if not self.jobs:
            self.feed.close()

    def _begin_next(self) -> None:
        with self.lock:
            if self.next_job < len(self.jobs) and self.mistake is None and not self.stopped:
                self._begin(self.next_job)
                self.next_job += 1
            if self.next_job == len(self.jobs) or self.mistake is not None or self.stopped:
                self.feed.close()

    def _begin(self, place: int) -> None:
        """From any thread, under the lock."""
        context = self.open[place] = self._context(place)
        self.feed.begin(self._in_feed(place))
        self.loop.call(self._spawn, place, context, self._in_feed(place))

    def _spawn(self, place: int, context: Context, in_feed: int) -> None:
        self.loop.spawn(self._converse(place, context, in_feed), place)

    def _context(self, place: int) -> Context:
        prompt, index = self.jobs[place]
        owner = self.owner
        return Context(
            name=f"{prompt.prompt_id}/{index}" + (f"~{self.loops}" if self.loops else ""),
            sample_index=index,
            seed=request_seed(owner.cfg.seed, self.asked.step, prompt.prompt_id, index),
            max_turns=owner.section.max_turns,
            max_tokens=self.asked.sampling.max_response_tokens,
            max_observation_tokens=owner.section.max_observation_tokens,
            arguments=copy.deepcopy(dict(owner.section.arguments)),
            environment_class=owner.environment,
            task=owner.task,
            codec=owner.codec,
            evaluating=self.asked.evaluating,
        )

    async def _converse(self, place: int, context: Context, in_feed: int) -> None:
        """One conversation from its beginning to its result."""
        prompt, index = self.jobs[place]
        engine = Engine(
            ask=lambda request: self._ask(in_feed, request),
            sampling=self.asked.sampling,
            capture_routes=self.asked.capture_routes,
            context_tokens=self.owner.cfg.model.max_context_tokens,
            max_turn_tokens=self.owner.section.max_turn_tokens,
            stop=tuple(self.owner.section.stop),
        )
        found: list[Sample] = []
        mistake: BaseException | None = None
        try:
            found = await self._result(engine, prompt, context)
        except Failed as failure:
            found = [_failed(prompt, index, failure, context)]
        except BaseException as error:  # of the user's config, or this program's: nobody else would hear of it
            mistake = error
        with self.lock:
            if self.open.get(place) is not context:
                return  # its loop was given up meanwhile
            if not self.stopped:
                self.mistake = self.mistake or mistake
            self.results[place] = found
            self.over.put(place)
            self._begin_next()
            self._end(place)

    async def _result(self, engine: Engine, prompt: Prompt, context: Context) -> list[Sample]:
        seconds = self.owner.section.timeout_seconds
        own = replace(prompt, info=copy.deepcopy(prompt.info)) if prompt.info else prompt  # what it changes is seen by no other
        task = asyncio.create_task(_called(self.owner.function, engine, own, context))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            raise Failed("timeout", f"not done within {seconds:g} s")
        try:
            result = task.result()
        except BaseException as error:
            cause = _cause(error)
            if isinstance(cause, Failed | UserError):
                raise cause from None
            if isinstance(cause, Interrupted):
                raise Failed("timeout", _held()) from None
            if isinstance(cause, asyncio.CancelledError):
                raise Failed("rollout", "the function cancelled itself") from None
            raise Failed("rollout", f"the function raised {told(cause, where=True)}") from error
        vocabulary = self.owner.cfg.model.vocab_size
        return checked(result, prompt, context.sample_index, self.asked.capture_routes, vocabulary)

    def _ask(self, in_feed: int, request: Request) -> Awaitable[Sample]:
        """The engine's answer; requests are told apart by a number of their own, because a conversation may have several."""
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        with self.lock:
            ticket, self.tickets = self.tickets, self.tickets + 1
        self.waiting[ticket] = (in_feed, request, future)
        try:
            self.feed.put(replace(request, sample_index=ticket), in_feed)
        except KeyError:
            del self.waiting[ticket]
            raise Failed("rollout", "the engine was asked for more when the conversation was over") from None
        return future


def _held() -> str:
    return f"the function held the event loop for {foreign.BLOCKED_SECONDS:g} s without an await"


def _cause(error: BaseException) -> BaseException:
    """The first of a group's errors, which a TaskGroup makes of those of its tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    result = function(*arguments)
    return await result if inspect.isawaitable(result) else result


def _failed(prompt: Prompt, index: int, failure: Failed, context: Context | None) -> Sample:
    """What is left of a conversation that failed: a reason, and its turns for a reader. Nothing to train on."""
    turns = [turn for talk in (context.started if context else ()) for turn in talk.turns]
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
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(
            f"{section._target_} yields; a rollout function returns its samples", key="task.rollout._target_", fix="return [..]"
        )
    environment = named(section.environment, "task.rollout.environment") if section.environment else None
    missing = [name for name in ("reset", "step") if not callable(getattr(environment, name, None))]
    if function is drive and inspect.isclass(environment) and missing:
        raise UserError(
            f"{section.environment} has no {' and no '.join(missing)}",
            key="task.rollout.environment",
            fix="a class with reset and step: docs/turns.md",
        )
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
            counts = [[n for note in rows if isinstance(n := note.get(name), int) and 0 <= n <= MAX_NOTED] for rows in notes]
            if any(counts):
                found[f"rollout/{name}"] = sum(map(sum, counts)) / len(whole)
        found["rollout/observation_tokens"] = sum(int((~sample.loss_mask).sum()) for sample in whole) / len(whole)
    return found


def _turns(sample: Sample) -> Iterator[dict[str, Any]]:
    yield from sample.info.get("turns", ())
