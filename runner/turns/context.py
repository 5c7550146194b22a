"""What a rollout function sees: an engine, whichever it is, and what its conversation is made of."""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from runner.data import Request, Sample, SamplingParams, Status
from runner.errors import told
from runner.tasks.protocol import Prompt
from runner.turns.codec import Codec
from runner.turns.failure import Failed
from runner.turns.transcript import Transcript, Turn


class Interrupted(BaseException):
    """Raised inside user code past its deadline; not an Exception, so that `except Exception` lets it through."""


@dataclass
class Engine:
    """The one interface to the rollout engines. `ask` brings a request to them; any number may be under way."""

    ask: Callable[[Request], Awaitable[Sample]]
    sampling: SamplingParams
    capture_routes: bool
    context_tokens: int  # of the model
    max_turn_tokens: int | None
    stop: tuple[str, ...]

    async def generate(self, talk: Transcript, *, max_tokens: int | None = None, stop: tuple[str, ...] | None = None) -> Turn:
        """The model's next turn, which is then part of the transcript.

        It ends at an end token, at one of the `stop` texts (task.rollout.stop), or at `max_tokens` (task.rollout.max_turn_tokens)
        or what room is left. Without room it is empty. Failed where the engine failed.
        """
        if len(talk.tokens) >= self.context_tokens:
            raise Failed("context", f"{len(talk.tokens)} tokens, the model's context is {self.context_tokens}")
        room = min(talk.room, self.context_tokens - len(talk.tokens))
        most = min([room, *(limit for limit in (max_tokens, self.max_turn_tokens) if limit is not None)])
        if most < 1:
            talk.full = True
            return Turn("", [], "length")
        request = Request(
            prompt_id=talk.prompt.prompt_id,
            sample_index=talk.sample_index,
            tokens=tuple(talk.tokens),
            sampling=replace(self.sampling, max_response_tokens=most),
            seed=talk.seed,
            capture_routes=self.capture_routes,
            images=tuple(talk.images),
            conversation=talk.key,
            known_routes=talk.rows,
        )
        piece = await self.ask(request)
        if piece.status is Status.failed:
            raise Failed("engine", piece.finish_reason)
        return talk.add(piece, self.stop if stop is None else stop)


@dataclass
class Context:
    """One conversation's surroundings.

    sample_index   which sample of its prompt it is
    seed           for the user's own random numbers: the same for the same step, prompt and sample
    evaluating     whether nothing is trained on it
    arguments      task.rollout.arguments
    tokenizer, task  of the run; `codec` encodes and decodes as conversations do
    """

    sample_index: int
    seed: int
    max_turns: int
    max_tokens: int
    max_observation_tokens: int
    arguments: dict[str, Any]
    environment_class: Callable[..., Any] | None
    task: Any
    codec: Codec
    evaluating: bool
    started: list[Transcript] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return self.codec.tokenizer

    def start(self, prompt: Prompt) -> Transcript:
        """A new transcript. A conversation may have several: each is a sample where the function returns a list."""
        number = len(self.started)
        key = f"{prompt.prompt_id}/{self.sample_index}.{number}"
        seed = (self.seed + 0x9E3779B97F4A7C15 * number) % 2**63
        talk = Transcript(prompt, self.sample_index, key, seed, self.codec, self.max_tokens, self.max_observation_tokens)
        self.started.append(talk)
        return talk

    def environment(self) -> Any:
        """A new one. Failed where its constructor raises."""
        if self.environment_class is None:
            raise Failed("environment", "task.rollout.environment names no class")
        try:
            return self.environment_class(**self.arguments)
        except Exception as error:
            raise Failed("environment", f"its constructor raised {told(error, where=True)}") from error

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a method of an environment, async or not. Failed with what it raised."""
        try:
            if inspect.iscoroutinefunction(function):
                return await function(*arguments)
            return await in_thread(function, *arguments)
        except Failed:
            raise
        except Exception as error:
            raise Failed("environment", f"{getattr(function, '__name__', 'it')} raised {told(error, where=True)}") from error


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that runs in a daemon thread of its own. Cancelling interrupts its Python code; what blocks
    inside C code keeps its thread until it returns, and its result is dropped."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Interrupted:
            return
        except Exception as raised:
            error = raised
        except BaseException as raised:  # SystemExit of a library's exit() ends this call only
            error = RuntimeError(told(raised)).with_traceback(raised.__traceback__)
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    thread = threading.Thread(target=work, name="environment", daemon=True)
    thread.start()
    try:
        return await answer
    except asyncio.CancelledError:
        interrupt(thread)
        raise


def interrupt(thread: threading.Thread) -> None:
    """Raise Interrupted in the Python code of a thread."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Interrupted))
