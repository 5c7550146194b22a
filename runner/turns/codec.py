"""Text of turns and observations, from and to tokens.

An observation is tokenized by itself and put behind the model's tokens (delta tokenization). Where it is a message of a chat
template, its tokens are what the template writes between the model's turn and the next one; that this holds is checked: a
template that writes earlier turns differently once later ones follow (Qwen3 drops the thinking of turns before the last user
message) would train on conversations that no engine ever sees, and is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from runner.config.choices import ObservationRole
from runner.errors import UserError
from runner.tasks.encoding import MAX_CHARACTERS_PER_TOKEN, TextEncoder
from runner.turns.failure import Failed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runner.turns.transcript import Turn

KEY = "task.rollout.observation_role"
THINK, THINKING = "<think>\n", "</think>"
SAID, THOUGHT, SEEN = "<model says>", f"{THINK}model thinks\n{THINKING}\n\n<model says>", "\ue000"


class Codec:
    """`decode` gives the text of response ids without special tokens and without the end token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decode: Callable[[list[int]], str], ends: Iterable[int], role: ObservationRole
    ) -> None:
        """UserError where the chat template cannot be continued."""
        self.tokenizer, self.decode, self.ends, self.role = tokenizer, decode, frozenset(ends), role
        self.encoder = TextEncoder(tokenizer)
        if role != ObservationRole.none:
            _between(tokenizer, role, SAID)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token. ValueError for half a character."""
        return self.encoder.encode([self.encoder.hide(text)])[0]

    def observation(self, text: object, most: int, first: bool, closed: bool) -> list[int]:
        """Ids of what an environment says after a turn (`first`: before any; `closed`: the model wrote its end token itself).
        Failed for no text, or more than `most` tokens."""
        if not isinstance(text, str):
            raise Failed("rubbish", f"the environment's observation is a {type(text).__name__}, not a text")
        if len(text) > most * MAX_CHARACTERS_PER_TOKEN:
            raise Failed("flood", f"an observation of {len(text):,} characters; {most} tokens are allowed")
        try:
            hidden = self.encoder.hide(text)
            if self.role == ObservationRole.none or first:
                ids = self.encoder.encode([hidden])[0]
            else:
                ids = self.encoder.encode([self._written.replace(SEEN, hidden)])[0]
                ids = ids[1:] if closed and ids[0] in self.ends else ids
        except ValueError as error:
            raise Failed("rubbish", f"the environment's observation: {error}") from None
        if len(ids) > most:
            raise Failed("flood", f"an observation of {len(ids):,} tokens; {most} are allowed")
        return ids

    def until_stop(self, ids: list[int], stop: tuple[str, ...]) -> tuple[int, str | None]:
        """How many of the ids hold everything up to the first of the texts, and what they say up to its end; all and None
        without one."""
        whole = self.decode(ids) if stop else ""
        if not any(text in whole for text in stop):
            return len(ids), None
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if any(text in self.decode(ids[:middle]) for text in stop) else (middle + 1, high)
        return low, whole[: min(place + len(text) for text in stop if (place := whole.find(text)) >= 0)]

    def look_at(self, turn: Turn) -> None:
        """Refuse a template that would drop what this turn holds."""
        if self.role != ObservationRole.none and THINKING in turn.text:
            _ = self._with_thinking

    @cached_property
    def _written(self) -> str:
        return _between(self.tokenizer, self.role, SAID)

    @cached_property
    def _with_thinking(self) -> str:
        return _between(self.tokenizer, self.role, THOUGHT)


def _between(tokenizer: PreTrainedTokenizerBase, role: ObservationRole, said: str) -> str:
    """What the template writes from the end of a turn of the model to the beginning of the next, with SEEN for the observation.

    UserError where a conversation that has gone on does not begin with what the engine saw before.
    """
    spoken = (("user", "question"), ("assistant", said), (role.value, SEEN))
    question, answer, seen = ({"role": who, "content": text} for who, text in spoken)

    def render(*messages: dict[str, Any]) -> str:
        return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    try:
        asked = render(question)
        if asked.endswith(THINK) and said == SAID:  # every turn begins with thinking: there is no plain one
            return _between(tokenizer, role, THOUGHT)
        more, most = render(question, answer, seen), render(question, answer, seen, answer, seen)
    except UserError:
        raise
    except Exception as error:  # a template runs code of its own and refuses conversations in many ways
        problem = f"the chat template refuses a message of role {role.value!r} after the model's: {error}"
        raise UserError(problem, key=KEY, fix=f"{KEY}=user, or none") from None
    written = said.removeprefix(THINK) if asked.endswith(THINK) else said
    between = more[len(asked) + len(written) :]
    if not more.startswith(asked + written) or SEEN not in between or not most.startswith(more + written):
        thinking = ": the model's thinking" if said == THOUGHT else ""
        raise UserError(
            f"the chat template rewrites earlier turns once a message of role {role!r} follows{thinking}; what is trained on "
            "would not be what the engine saw",
            key=KEY,
            fix=f"{KEY}=tool where the template keeps the turns before a tool's answer, or none (plain text)",
        )
    return between
