"""Counting shapes in a made-up image: a vision task that a tiny model learns from nothing.

    image     3 x 3 cells of 8 x 8 pixels, some with a red square, a blue triangle, ... on a plain noisy ground
    prompt    <image>how many red squares?
    solution  1+0+2=3

One number per row of cells, then their sum: the number after the last '=' is the answer. A scene and its pixels depend on
(seed, split, index) alone; nothing is stored.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.config.limits import number
from runner.config.option import Option
from runner.config.schema import Config, TaskConfig
from runner.errors import UserError
from runner.tasks.protocol import Prompt
from runner.tasks.rules import held_out, seen_by
from runner.tasks.scenes import SHAPES, SMALLEST_CELL, SMALLEST_SHAPE, Scenes, counted_by_rows, filled, mask

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from runner.data import Sample
    from runner.models.images import ImageProcessor

COLORS = {"red": (220, 50, 40), "green": (40, 180, 70), "blue": (50, 90, 220), "yellow": (230, 200, 40)}
GROUND = (90, 150)  # gray levels of the ground


@dataclass
class VisualCountTaskConfig(TaskConfig):
    grid: int = number(ge=1, le=64)  # cells per side of the image
    cell_pixels: int = number(ge=SMALLEST_CELL, le=512)  # side of a cell
    colors: int = number(ge=1, le=len(COLORS))  # kinds of colour, of red, green, blue, yellow
    shapes: int = number(ge=1, le=len(SHAPES))  # kinds of shape, of square, triangle, circle
    max_count: int = number(ge=1, le=64**2)  # largest answer; answers are drawn evenly
    clutter: float = number(ge=0, le=1)  # share of the other cells that hold another shape
    noise: int = number(ge=0, le=255)  # gray levels by which a pixel may be off
    eval_problems: int = number(ge=1, le=10**6)  # held out from training


@dataclass(frozen=True)
class Scene:
    """cells: (color, shape) or None, row by row; wanted: what is counted; pixel_seed: of places, ground and noise."""

    cells: tuple[tuple[str, str] | None, ...]
    wanted: tuple[str, str]
    pixel_seed: int

    @property
    def count(self) -> int:
        return self.cells.count(self.wanted)


class VisualCountTask(Scenes[Scene]):
    name = "visual_count"

    def __init__(self, cfg: VisualCountTaskConfig, tokenizer: PreTrainedTokenizerBase, processor: ImageProcessor) -> None:
        """UserError when cells are too small, the image is not made of whole tokens, or prompts are too long."""
        kinds = [(color, shape) for color in list(COLORS)[: cfg.colors] for shape in SHAPES[: cfg.shapes]]
        super().__init__(cfg, tokenizer, processor, kinds)
        longest = max(len(self._prompt("check", Scene((None,) * cfg.grid**2, kind, 0)).tokens) for kind in kinds)
        self._need_room(longest, f"raise it to {longest}, or use a smaller task.grid")

    def reward(self, prompt: Prompt, text: str, sample: Sample | None = None) -> float:
        """1 if the number after the last '=' is the count, else 0; the rows before it are not looked at."""
        answer = text.rpartition("=")[2].strip()
        if "=" not in text or not answer.isascii() or not answer.isdigit() or len(answer) > 8:
            return 0.0
        return float(int(answer) == int(prompt.answer))

    def worked_solutions(self, count: int, seed: int) -> list[tuple[str | Prompt, str]]:
        """`count` (prompt, solution text) pairs; held-out problems never appear."""
        scenes = [self._train_scene("worked", seed, index) for index in range(count)]
        return [(self._prompt(f"visual_count/worked.{i}", scene), self.solution(scene)) for i, scene in enumerate(scenes)]

    def solution(self, scene: Scene) -> str:
        return counted_by_rows(scene.cells, self.cfg.grid, scene.wanted)

    def _problem(self, scene: Scene) -> Hashable:
        return scene.cells, scene.wanted

    def _scene(self, random_stream: random.Random) -> Scene:
        wanted = random_stream.choice(self._kinds)
        cells = filled(random_stream, self.cfg, wanted, [kind for kind in self._kinds if kind != wanted])
        return Scene(cells, wanted, random_stream.getrandbits(63))

    def _prompt(self, prompt_id: str, scene: Scene) -> Prompt:
        color, shape = scene.wanted
        question = f"how many {color} {shape}s?"
        tokens, images = self.processor.place(self._ids(self.processor.mark + question), [draw(scene, self.cfg)])
        return Prompt(prompt_id, f"<image>{question}", tuple(tokens), str(scene.count), {}, images)


def draw(scene: Scene, cfg: VisualCountTaskConfig) -> np.ndarray:
    """uint8 [grid * cell, grid * cell, 3]: shapes of random size and place within their cells, on a ground of one gray."""
    import numpy as np  # here, because choosing a task imports no more than it must

    generator = np.random.Generator(np.random.PCG64(scene.pixel_seed))
    side, cell = cfg.grid * cfg.cell_pixels, cfg.cell_pixels
    pixels = np.full((side, side, 3), generator.integers(*GROUND), dtype=np.int64)
    for place, kind in enumerate(scene.cells):
        size = int(generator.integers(max(SMALLEST_SHAPE, cell * 5 // 8), cell))  # drawn for empty cells too
        down, right = (int(offset) for offset in generator.integers(0, cell - size + 1, 2))
        if kind is None:
            continue
        top, left = place // cfg.grid * cell + down, place % cfg.grid * cell + right
        pixels[top : top + size, left : left + size][mask(kind[1], size)] = COLORS[kind[0]]
    pixels += generator.integers(-cfg.noise, cfg.noise + 1, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def image_tokens(cfg: Config) -> Iterator[UserError]:
    task, tower = cfg.task, seen_by(cfg)
    assert isinstance(task, VisualCountTaskConfig)
    tokens = (task.grid * task.cell_pixels // tower.side) ** 2 + tower.marks if tower else 0
    if tokens >= task.max_prompt_tokens:
        yield UserError(
            f"an image of {task.grid} x {task.grid} cells is {tokens} tokens, prompts have {task.max_prompt_tokens} at most",
            key="task.grid",
            fix=f"a smaller task.grid, or task.max_prompt_tokens={tokens + 32}",
        )


def scenes(cfg: Config) -> Iterator[UserError]:
    task = cfg.task
    assert isinstance(task, VisualCountTaskConfig)
    if task.colors == task.shapes == 1:
        yield UserError("one kind of shape leaves nothing else in the image", key="task.colors", fix="task.colors=2")
    if task.max_count > task.grid**2:
        yield UserError(
            f"{task.max_count} shapes in {task.grid} x {task.grid} cells", key="task.max_count", fix=f"task.max_count={task.grid}"
        )
    yield from held_out(cfg)


OPTION = Option(VisualCountTaskConfig, rules=(image_tokens, scenes), shows_images=True)
