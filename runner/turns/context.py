"""What a rollout function sees: an engine, whichever it is, and what its conversation is made of."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from runner.data import Request, Sample, SamplingParams, Status
from runner.errors import told
from runner.foreign import in_thread
from runner.tasks.protocol import Prompt
from runner.turns.codec import Codec
from runner.turns.failure import Failed
from runner.turns.transcript import Transcript, Turn


@dataclass
class Engine:
    """The one interface to the rollout engines. `ask` brings a request to them; any number may be under way."""

    ask: Callable[[Request], Awaitable[Sample]]
    sampling: SamplingParams
    capture_routes: bool
    context_tokens: int  # of the model
    max_turn_tokens: int | None
    stop: tuple[str, ...]

    async def generate(self, talk: Transcript, *, max_tokens: int | None = None, stop: Sequence[str] | None = None) -> Turn:
        """The model's next turn, which is then part of the transcript.

        It ends at an end token, at one of the `stop` texts (task.rollout.stop), or at `max_tokens` (task.rollout.max_turn_tokens)
        or what room is left. Without room it is empty. Failed where the engine failed, and where another turn of this transcript
        is under way; different transcripts may be asked for at one time.
        """
        texts = self.stop if stop is None else _texts(stop)
        limits = [self.max_turn_tokens or self.context_tokens, self.context_tokens if max_tokens is None else _whole(max_tokens)]
        talk.check_idle()
        if len(talk.tokens) >= self.context_tokens:
            raise Failed("context", f"{len(talk.tokens)} tokens, the model's context is {self.context_tokens}")
        room = min(talk.room, self.context_tokens - len(talk.tokens))
        most = min(room, *limits)
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
        talk.asking = True
        try:
            piece = await self.ask(request)
        finally:
            talk.asking = False
        if piece.status is Status.failed:
            raise Failed("engine", piece.finish_reason)
        return talk.add(piece, texts)


def _whole(max_tokens: object) -> int:
    count = operator.index(max_tokens)  # type: ignore[arg-type]
    if count < 1:
        raise ValueError(f"max_tokens={count}: a turn has at least one token")
    return count


def _texts(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop={stop!r}: texts, none of them empty")
    return texts


@dataclass
class Context:
    """One conversation's surroundings.

    name           of the conversation, to the engine
    sample_index   which sample of its prompt it is
    seed           for the user's own random numbers: the same for the same step, prompt and sample
    evaluating     whether nothing is trained on it
    arguments      task.rollout.arguments
    tokenizer, task  of the run; `codec` encodes and decodes as conversations do
    """

    name: str
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
        key = f"{self.name}.{number}"
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
        except (Exception, SystemExit) as error:
            raise Failed("environment", f"its constructor raised {told(error, where=True)}") from error

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a method of an environment, async or not. Failed with what it raised."""
        try:
            own = inspect.iscoroutinefunction(function)
            result = await (function(*arguments) if own else in_thread(function, *arguments))
            return await result if inspect.isawaitable(result) else result
        except Failed:
            raise
        except Exception as error:
            raise Failed("environment", f"{getattr(function, '__name__', 'it')} raised {told(error, where=True)}") from error
