"""Scenes that are made up, some of them held out, as problems: what the tasks that count shapes share."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from runner.errors import UserError
from runner.tasks.protocol import Prompt
from runner.tasks.seeding import stream

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from runner.models.images import ImageProcessor

S = TypeVar("S")
Kind = tuple[str, str]  # colour or ink, and shape
SHAPES = ("square", "triangle", "circle")  # the easier to tell apart first
SMALLEST_SHAPE, SMALLEST_CELL = 5, 7  # pixels of a shape, and of a cell that holds it in more than one place


class Scenes(Generic[S]):
    """Half of a Task: its problems. `cfg` has grid, cell_pixels and eval_problems beside the keys of every task."""

    name: str

    def __init__(self, cfg: Any, tokenizer: PreTrainedTokenizerBase, processor: ImageProcessor, kinds: list[Kind]) -> None:
        """UserError when `grid` cells are not made of whole image tokens."""
        self.cfg, self.tokenizer, self.processor, self._kinds = cfg, tokenizer, processor, kinds
        pixels, side = cfg.grid * cfg.cell_pixels, processor.side
        if pixels % side:
            raise UserError(
                f"{cfg.grid} cells of {cfg.cell_pixels} pixels are {pixels}; an image token is {side} pixels wide",
                key="task.cell_pixels",
                fix=f"task.cell_pixels={-(-cfg.cell_pixels // side) * side}",
            )
        # drawn without the run's seed, so that evaluations of different runs compare
        self._held_out = [self._scene(stream(self.name, "held out", index)) for index in range(cfg.eval_problems)]
        self._held_out_set = frozenset(map(self._problem, self._held_out))

    def _scene(self, random_stream: random.Random) -> S:
        raise NotImplementedError

    def _problem(self, scene: S) -> Hashable:
        """What two scenes that are the same problem have in common."""
        raise NotImplementedError

    def _prompt(self, prompt_id: str, scene: S) -> Prompt:
        raise NotImplementedError

    def train_prompts(self, step: int, count: int, round: int = 0) -> list[Prompt]:
        """See Task. Problems are made afresh for every (step, round), without those that are held out."""
        return [
            self._prompt(f"{self.name}/{step}.{round}.{index}", self._train_scene("train", step, round, index))
            for index in range(count)
        ]

    def eval_prompts(self, count: int) -> list[Prompt]:
        return [self._prompt(f"{self.name}/eval.{i}", scene) for i, scene in enumerate(self._held_out[:count])]

    def _train_scene(self, *key: int | str) -> S:
        random_stream = stream(self.cfg.seed, self.name, *key)
        while self._problem(scene := self._scene(random_stream)) in self._held_out_set:
            pass
        return scene

    def _need_room(self, longest: int, fix: str) -> None:
        """UserError when the longest prompt is longer than prompts may be."""
        if longest > self.cfg.max_prompt_tokens:
            raise UserError(
                f"prompts have {longest} tokens, more than task.max_prompt_tokens={self.cfg.max_prompt_tokens}",
                key="task.max_prompt_tokens",
                fix=fix,
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def filled(random_stream: random.Random, cfg: Any, kind: Kind, others: Sequence[Kind]) -> tuple[Kind | None, ...]:
    """grid * grid cells, row by row, with 0 to `max_count` shapes of one kind and clutter of the others."""
    places = random_stream.sample(range(cfg.grid**2), random_stream.randint(0, cfg.max_count))
    cells: list[Kind | None] = []
    for place in range(cfg.grid**2):
        other = random_stream.choice(others) if random_stream.random() < cfg.clutter else None
        cells.append(kind if place in places else other)
    return tuple(cells)


def counted_by_rows(cells: Sequence[Kind | None], side: int, kind: Kind) -> str:
    """The solution: one number per row of cells, then their sum."""
    rows = [cells[row * side : (row + 1) * side].count(kind) for row in range(side)]
    return "+".join(map(str, rows)) + f"={sum(rows)}"


def mask(shape: str, size: int) -> np.ndarray:
    """bool [size, size]: the pixels of a shape as large as its box."""
    import numpy as np

    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    if shape == "square":
        return np.ones((size, size), dtype=bool)
    if shape == "circle":
        inside: np.ndarray = rows**2 + columns**2 <= (size / 2) ** 2
        return inside
    triangle: np.ndarray = np.abs(columns) <= (rows + size / 2) / 2
    return triangle
