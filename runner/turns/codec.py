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
from runner.turns.pictures import Pictures, is_image, parts_of

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from runner.models.images import Images
    from runner.turns.transcript import Turn

KEY = "task.rollout.observation_role"
THINK, THINKING = "<think>\n", "</think>"
SAID, THOUGHT, SEEN = "<model says>", f"{THINK}model thinks\n{THINKING}\n\n<model says>", "\ue000"


class Codec:
    """`decode` gives the text of response ids without special tokens and without the end token."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[list[int]], str],
        ends: Iterable[int],
        role: ObservationRole,
        pictures: Pictures | None = None,
    ) -> None:
        """`pictures`: of a model that sees. UserError where the chat template cannot be continued."""
        self.tokenizer, self.decode, self.ends, self.role = tokenizer, decode, frozenset(ends), role
        self.encoder, self.pictures = TextEncoder(tokenizer), pictures
        if role != ObservationRole.none:
            _between(tokenizer, role, SAID)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token. ValueError for half a character."""
        return self.encoder.encode([self.encoder.hide(text)])[0]

    def observation(
        self, seen: object, most: int, first: bool, closed: bool, place: int = 0, shown: int = 0
    ) -> tuple[list[int], Images]:
        """Ids and images of what an environment says after a turn (`first`: before any; `closed`: the model wrote its end token
        itself), which begins at `place` of its sequence, where `shown` images are before it.

        Failed for what is neither text nor image, for more than `most` tokens, and for images that are too many or unreadable.
        """
        parts = parts_of(seen)
        texts = [part for part in parts if isinstance(part, str)]
        for part in parts or [None]:
            if not isinstance(part, str) and not is_image(part):
                inside = "a list with a " if isinstance(seen, list) else "a "
                raise Failed(
                    "rubbish", f"the environment's observation is {inside}{type(part).__name__}, not of texts and images"
                )
        if (length := sum(map(len, texts))) > most * MAX_CHARACTERS_PER_TOKEN:
            raise Failed("flood", f"an observation of {length:,} characters; {most} tokens are allowed")
        pixels = self._pixels([part for part in parts if not isinstance(part, str)], shown)
        mark = self.pictures.processor.mark if self.pictures else ""
        try:
            hidden = "".join(self.encoder.hide(part) if isinstance(part, str) else mark for part in parts)
            if self.role == ObservationRole.none or first:
                ids = self.encoder.encode([hidden])[0]
            else:
                ids = self.encoder.encode([self._written.replace(SEEN, hidden)])[0]
                ids = ids[1:] if closed and ids[0] in self.ends else ids
            images: Images = ()
            if self.pictures is not None and pixels:
                ids, images = self.pictures.processor.place(ids, pixels, place)
        except ValueError as error:
            raise Failed("rubbish", f"the environment's observation: {error}") from None
        if len(ids) > most:
            of_images = f" ({sum(image.tokens for image in images):,} of images)" if images else ""
            raise Failed("flood", f"an observation of {len(ids):,} tokens{of_images}; {most} are allowed")
        return ids, images

    def _pixels(self, given: list[object], shown: int) -> list[np.ndarray]:
        if given and self.pictures is None:
            raise Failed("image", "the environment shows an image, and the model has no visual tower")
        if self.pictures is None or not given:
            return []
        if shown + len(given) > self.pictures.most:
            raise Failed(
                "image", f"{shown + len(given)} images in one conversation; task.rollout.max_images={self.pictures.most}"
            )
        return [self.pictures.pixels(part) for part in given]

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
