r"""Geometry3K: questions about a diagram; a line is {"problem": "<image>Find x.", "answer": "12", "image": "diagrams/7.png"}.

`image` is a path relative to the file; `image_base64` holds the file's bytes instead; `images: [...]` are several paths, in the
order of the problem's <image>s. Where `datasets` keeps images, `{"bytes": ...}` stands for a path. A problem without any <image>
gets them in front. Encoded images stay in memory; pixels exist while a prompt is in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import Config
from runner.errors import UserError
from runner.models.pictures import image_bytes, open_rgb, resized
from runner.tasks import symbolic
from runner.tasks.grading import final_answer, same_answer
from runner.tasks.jsonl import MACHINE, NEEDS, RULES, JsonlTask, JsonlTaskConfig, Problem, conversation
from runner.tasks.protocol import Prompt
from runner.tasks.rules import seen_by

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from runner.models.images import ImageProcessor

PLACEHOLDER = "<image>"
CACHED_IMAGES = 256  # decoded at one time, besides those in use
MAX_ORIGINAL_PIXELS = 1 << 22  # of an image that tools look at closer: larger ones are reduced to 4 million


@dataclass
class Geo3kTaskConfig(JsonlTaskConfig):
    min_image_pixels: int = number(ge=1, le=2**28)  # images are resized to whole tokens with this many pixels at least
    max_image_pixels: int = number(ge=1, le=2**28)  # and this many at most


class Geo3kTask(JsonlTask):
    name = "geo3k"
    prompt_field = "problem"

    def __init__(self, cfg: Geo3kTaskConfig, tokenizer: PreTrainedTokenizerBase, processor: ImageProcessor) -> None:
        """As JsonlTask; every image is decoded once here, so that a bad one stops the run before it starts."""
        self.processor = processor
        self._limits = cfg.min_image_pixels, cfg.max_image_pixels
        self._encoded: dict[str, list[bytes]] = {}  # by the problem's place
        self._pixels = lru_cache(maxsize=CACHED_IMAGES)(self._decode)
        self._keeps_originals = cfg.rollout._target_ is not None  # a tool may look closer
        super().__init__(cfg, tokenizer)
        symbolic.shared.start()

    def parse(self, row: dict[str, Any], place: str) -> Problem:
        messages, answer = conversation(row["problem"], "problem"), row["answer"]
        if not isinstance(answer, str | int | float):
            raise TypeError("`answer` must be a string or a number")
        if not str(answer).strip():
            raise ValueError("`answer` is empty")
        self._encoded[place] = image_bytes(row, Path(place.rpartition(":")[0]).parent)
        named, given = sum(message["content"].count(PLACEHOLDER) for message in messages), len(self._encoded[place])
        if named not in (0, given):
            raise ValueError(f"`problem` names {named} images, the line has {given}")
        self._decode(place)
        if not named:
            *before, last = messages
            messages = (*before, last | {"content": PLACEHOLDER * given + last["content"]})
        return Problem(messages, str(answer).strip(), place)

    def grade(self, answer: str, text: str) -> bool:
        r"""The last \boxed{}, or the last 'Answer:' line where it comes later, must equal the reference; see grading.py."""
        given = final_answer(text)
        return given is not None and same_answer(given, answer)

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        return [self._shown(prompt) for prompt in super().train_prompts(step, count, round)]

    def eval_prompts(self, count: int) -> list[Prompt]:
        return [self._shown(prompt) for prompt in super().eval_prompts(count)]

    def _tokenize(self, problems: list[Problem], texts: list[str], key: str) -> Sequence[Sequence[int]]:
        """Each placeholder of a text is as many tokens as its image."""
        marked = [text.replace(PLACEHOLDER, self.processor.mark) for text in texts]
        rows = []
        for problem, ids in zip(problems, super()._tokenize(problems, marked, key), strict=True):
            try:
                rows.append(self.processor.place(list(ids), self._pixels(problem.place))[0])
            except ValueError as error:  # the question or the template names special tokens itself
                raise UserError(f"{problem.place}: {error}", key=key, fix="mend or remove this line") from None
        return rows

    def _hidden(self, message: dict[str, str]) -> dict[str, str]:
        """All but the placeholders, which stand for the images."""
        parts = message["content"].split(PLACEHOLDER)
        return super()._hidden(message) | {"content": PLACEHOLDER.join(self.encoder.hide(parts))}

    def _decode(self, place: str) -> list[np.ndarray]:
        opened = [open_rgb(data) for data in self._encoded[place]]
        return [resized(image, *self.processor.fitted_size(image.height, image.width, *self._limits)) for image in opened]

    def _shown(self, prompt: Prompt) -> Prompt:
        """The prompt with its images, whose tokens are in place already."""
        place = prompt.info["place"]
        originals = tuple(map(_original, self._encoded[place])) if self._keeps_originals else ()
        return replace(prompt, images=self.processor.at(prompt.tokens, self._pixels(place)), originals=originals)


def _original(data: bytes) -> np.ndarray:
    image = open_rgb(data)
    shrink = min(1.0, (MAX_ORIGINAL_PIXELS / (image.width * image.height)) ** 0.5)
    return resized(image, max(1, int(image.height * shrink)), max(1, int(image.width * shrink)))


def image_tokens(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, Geo3kTaskConfig)
    tower = seen_by(cfg)
    if tower is None:
        return
    side, tokens = tower.side, task.max_image_pixels // tower.side**2 + tower.marks
    if tokens >= task.max_prompt_tokens:
        yield UserError(
            f"an image of {task.max_image_pixels} pixels is {tokens} tokens, prompts have {task.max_prompt_tokens} at most",
            key="task.max_image_pixels",
            fix=f"task.max_image_pixels={max(1, task.max_prompt_tokens // 2) * side**2}",
        )
    if not side**2 <= task.min_image_pixels <= task.max_image_pixels:
        yield UserError(
            f"images of {task.min_image_pixels} to {task.max_image_pixels} pixels; one token is {side} x {side}",
            key="task.min_image_pixels",
            fix=f"task.min_image_pixels={min(max(side**2, task.min_image_pixels), max(side**2, task.max_image_pixels))}",
        )


OPTION = Option(Geo3kTaskConfig, rules=(*RULES, image_tokens), machine=MACHINE, needs=NEEDS, shows_images=True)
