"""Counting shapes that are too small to be seen: the model picks a field of the image and is shown it at full size.

    prompt       <image>how many white squares on green?        the image: fields with grounds of different colours, reduced
    model        zoom 3                                         fields are counted row by row from 1
    environment  <image>                                        field 3 as it was drawn
    model        1+0+2=3                                        one number per row of cells, then the answer

In the reduced image a field is a token wide, of `overview_pixels` x `overview_pixels` different pixels: its ground is plain to
see, and its shapes are not. A scene and its pixels depend on (seed, split, index) alone; nothing is stored.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import Config, TaskConfig
from runner.errors import UserError
from runner.tasks.protocol import Prompt
from runner.tasks.rules import held_out, seen_by, turns_needed
from runner.tasks.scenes import SHAPES, SMALLEST_CELL, SMALLEST_SHAPE, Scenes, counted_by_rows, filled, mask

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample
    from runner.models.images import ImageProcessor

GROUNDS = {
    "red": (200, 60, 50), "green": (50, 170, 80), "blue": (60, 80, 210), "yellow": (200, 180, 40),
    "purple": (140, 50, 160), "teal": (40, 150, 160), "gray": (128, 128, 128), "brown": (110, 70, 40), "pink": (220, 130, 170),
}  # fmt: skip
INKS = {"white": 245, "black": 10}
_CALL = re.compile(r"zoom ([1-9])", re.ASCII)
_ANSWER = re.compile(r"[0-9+]*=([0-9]{1,3})", re.ASCII)


@dataclass
class VisualZoomTaskConfig(TaskConfig):
    fields: int = number(ge=1, le=3)  # per side of the image; each has a ground of its own
    grid: int = number(ge=1, le=16)  # cells per side of a field
    cell_pixels: int = number(ge=SMALLEST_CELL, le=512)  # side of a cell, as it was drawn
    overview_pixels: int = number(ge=1, le=512)  # per side of a field that are left of it in the reduced image
    inks: int = number(ge=1, le=len(INKS))  # kinds of ink, of white, black
    shapes: int = number(ge=1, le=len(SHAPES))  # kinds of shape, of square, triangle, circle
    max_count: int = number(ge=1, le=16**2)  # largest answer; answers are drawn evenly
    clutter: float = number(ge=0, le=1)  # share of the other cells that hold another shape
    noise: int = number(ge=0, le=255)  # gray levels by which a pixel may be off
    zoom_reward: float = number(ge=0, le=10)  # for the first look at the field that is asked about
    format_penalty: float = number(ge=0, le=10)  # for each turn that is neither a call nor an answer
    eval_problems: int = number(ge=1, le=10**6)  # held out from training


@dataclass(frozen=True)
class Field:
    """cells: (ink, shape) or None, row by row."""

    ground: str
    cells: tuple[tuple[str, str] | None, ...]


@dataclass(frozen=True)
class Scene:
    """fields: row by row; wanted: the field that is asked about, and what is counted in it; pixel_seed: of places and noise."""

    fields: tuple[Field, ...]
    wanted: int
    kind: tuple[str, str]
    pixel_seed: int

    @property
    def count(self) -> int:
        return self.fields[self.wanted].cells.count(self.kind)


class Zoom:
    """The environment (task.rollout.environment) of one problem: shows fields of the image that the prompt shows reduced."""

    def __init__(self, zoom_reward: float, format_penalty: float) -> None:
        self.zoom_reward, self.penalty = zoom_reward, format_penalty

    async def reset(self, prompt: Prompt) -> None:
        self.answer, self.wanted, self.side = int(prompt.answer), prompt.info["field"], prompt.info["fields"]
        (self.pixels,) = prompt.originals
        self.looked = False

    async def step(self, response: str) -> tuple[Any, bool, dict[str, Any]]:
        """Rewards: `answer` is 1 for the right one, `field` for the first look at the right field; `format` is minus the penalty
        for a turn that says nothing."""
        if (call := _CALL.fullmatch(response)) and int(call[1]) <= self.side**2:
            field = int(call[1])
            right = field == self.wanted and not self.looked
            self.looked = self.looked or right
            found = {"field": self.zoom_reward} if right and self.zoom_reward else {}
            return self.crop(field), False, {"tool_calls": 1, "zoomed": field, "rewards": found}
        if answer := _ANSWER.fullmatch(response):
            return "", True, {"rewards": {"answer": float(int(answer[1]) == self.answer)}}
        return "?;", False, {"tool_errors": 1, "rewards": {"format": -self.penalty}}

    def crop(self, field: int) -> np.ndarray:
        size = len(self.pixels) // self.side
        down, right = divmod(field - 1, self.side)
        return self.pixels[down * size : (down + 1) * size, right * size : (right + 1) * size]


class VisualZoomTask(Scenes[Scene]):
    name = "visual_zoom"

    def __init__(self, cfg: VisualZoomTaskConfig, tokenizer: PreTrainedTokenizerBase, processor: ImageProcessor) -> None:
        """UserError when a field is not made of whole image tokens, or prompts are too long."""
        kinds = [(ink, shape) for ink in list(INKS)[: cfg.inks] for shape in SHAPES[: cfg.shapes]]
        super().__init__(cfg, tokenizer, processor, kinds)
        longest = max(len(self._prompt("check", scene).tokens) for scene in self._held_out)
        self._need_room(longest, f"task.max_prompt_tokens={longest}")

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        """Of a conversation that never answered: nothing. The environment rewards all others."""
        return 0.0

    def worked_solutions(self, count: int, seed: int) -> list[tuple[str | Prompt, str]]:
        """One turn each: the question with its call, then the question, the call and the field with the answer."""
        found: list[tuple[str | Prompt, str]] = []
        for index in range(-(-count // 2)):
            scene = self._train_scene("worked", seed, index)
            prompt = self._prompt(f"visual_zoom/worked.{index}", scene)
            call = f"zoom {scene.wanted + 1}"
            said = [*prompt.tokens, *self._ids(call), self.tokenizer.eos_token_id]
            ids, images = self.processor.place(self._ids(self.processor.mark), [self._field(prompt, scene)], len(said))
            looked = Prompt(prompt.prompt_id, "", (*said, *ids), prompt.answer, {}, (*prompt.images, *images))
            found += [(prompt, call), (looked, self.solution(scene))]
        return found[:count]

    def solution(self, scene: Scene) -> str:
        return counted_by_rows(scene.fields[scene.wanted].cells, self.cfg.grid, scene.kind)

    def _field(self, prompt: Prompt, scene: Scene) -> np.ndarray:
        zoom = Zoom(0.0, 0.0)
        (zoom.pixels,), zoom.side = prompt.originals, self.cfg.fields
        return zoom.crop(scene.wanted + 1)

    def _problem(self, scene: Scene) -> Hashable:
        return scene.fields, scene.wanted, scene.kind

    def _scene(self, random_stream: random.Random) -> Scene:
        count = self.cfg.fields**2
        grounds = random_stream.sample(list(GROUNDS)[:count], count)
        kind = random_stream.choice(self._kinds)
        others = [other for other in self._kinds if other != kind]
        fields = tuple(Field(ground, filled(random_stream, self.cfg, kind, others)) for ground in grounds)
        return Scene(fields, random_stream.randrange(count), kind, random_stream.getrandbits(63))

    def _prompt(self, prompt_id: str, scene: Scene) -> Prompt:
        ink, shape = scene.kind
        question = f"how many {ink} {shape}s on {scene.fields[scene.wanted].ground}?"
        pixels = draw(scene, self.cfg)
        small = reduced(pixels, self.cfg.fields * self.cfg.overview_pixels, self.cfg.fields * self.processor.side)
        tokens, images = self.processor.place(self._ids(self.processor.mark + question), [small])
        info = {"field": scene.wanted + 1, "fields": self.cfg.fields}
        return Prompt(prompt_id, f"<image>{question}", tuple(tokens), str(scene.count), info, images, (pixels,))


def draw(scene: Scene, cfg: VisualZoomTaskConfig) -> np.ndarray:
    """uint8 [side, side, 3], side = fields * grid * cell_pixels: shapes of random size and place within their cells."""
    import numpy as np  # here, because choosing a task imports no more than it must

    generator = np.random.Generator(np.random.PCG64(scene.pixel_seed))
    cell, size = cfg.cell_pixels, cfg.grid * cfg.cell_pixels
    pixels = np.zeros((cfg.fields * size, cfg.fields * size, 3), dtype=np.int64)
    for index, field in enumerate(scene.fields):
        down, right = (size * place for place in divmod(index, cfg.fields))
        inside = pixels[down : down + size, right : right + size]
        inside[:] = GROUNDS[field.ground]
        for place, kind in enumerate(field.cells):
            side = int(generator.integers(max(SMALLEST_SHAPE, cell * 5 // 8), cell))
            top, left = (int(offset) for offset in generator.integers(0, cell - side + 1, 2))
            if kind is not None:
                top, left = top + place // cfg.grid * cell, left + place % cfg.grid * cell
                inside[top : top + side, left : left + side][mask(kind[1], side)] = INKS[kind[0]]
    pixels += generator.integers(-cfg.noise, cfg.noise + 1, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def reduced(pixels: np.ndarray, kept: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3] of kept x kept squares, each the mean of the pixels that it stands for."""
    import numpy as np
    from PIL import Image

    small = Image.fromarray(pixels).resize((kept, kept), Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.NEAREST))


def image_tokens(cfg: Config) -> Iterator[UserError]:
    task, tower = cfg.task, seen_by(cfg)
    assert isinstance(task, VisualZoomTaskConfig)
    tokens = (task.grid * task.cell_pixels // tower.side) ** 2 + tower.marks if tower else 0
    if tokens > task.rollout.max_observation_tokens:
        yield UserError(
            f"a field of {task.grid} x {task.grid} cells is {tokens} tokens",
            key="task.rollout.max_observation_tokens",
            fix=f"task.rollout.max_observation_tokens={tokens}, or a smaller task.grid",
        )


def scenes(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, VisualZoomTaskConfig)
    if task.inks == task.shapes == 1 and task.clutter:
        yield UserError("one kind of shape leaves nothing else in a field", key="task.inks", fix="task.inks=2, or task.clutter=0")
    if task.max_count > task.grid**2:
        yield UserError(
            f"{task.max_count} shapes in {task.grid} x {task.grid} cells", key="task.max_count", fix=f"task.max_count={task.grid}"
        )
    yield from held_out(cfg)


has_turns = turns_needed("the shapes are too small to be counted before a field was shown")
OPTION = Option(VisualZoomTaskConfig, rules=(has_turns, image_tokens, scenes), shows_images=True)
