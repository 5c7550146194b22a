"""A closer look at a part of an image that the prompt shows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from runner.tools.protocol import ToolError

if TYPE_CHECKING:
    import numpy as np

    from runner.tasks.protocol import Prompt

SCALE = 1000  # coordinates count thousandths of an image, as Qwen3-VL writes boxes
SMALLEST_PIXELS = 4  # of a side


class Zoom:
    """`max_calls`: of one conversation; each brings an image, which the model has to have room for."""

    name = "zoom"
    description = (
        "Shows a part of an image of the question at full size. image: its number, from 1. "
        "box: [left, top, right, bottom] in thousandths of its width and height."
    )
    parameters: dict[str, dict[str, Any]] = {
        "image": {"type": "integer"},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
    }

    def __init__(self, max_calls: int = 4) -> None:
        self.max_calls, self.calls = max_calls, 0
        self.pictures: tuple[np.ndarray, ...] = ()

    def begin(self, prompt: Prompt) -> None:
        """The images of this conversation, as large as the task has them."""
        self.pictures, self.calls = prompt.originals or tuple(image.pixels for image in prompt.images), 0

    def call(self, **arguments: Any) -> list[Any]:
        """[what is shown, uint8 [H, W, 3]]. ToolError for another image than there are, no box, or one that holds nothing."""
        if self.calls >= self.max_calls:
            raise ToolError(f"no more than {self.max_calls} looks")
        number, box = _whole(arguments["image"], "image"), _box(arguments["box"])
        if not 1 <= number <= len(self.pictures):
            raise ToolError(f"there are {len(self.pictures)} images, numbered from 1")
        picture = self.pictures[number - 1]
        height, width = picture.shape[:2]
        left, right = (round(width * value / SCALE) for value in (box[0], box[2]))
        top, bottom = (round(height * value / SCALE) for value in (box[1], box[3]))
        if right - left < SMALLEST_PIXELS or bottom - top < SMALLEST_PIXELS:
            raise ToolError(f"the box holds {max(0, right - left)} x {max(0, bottom - top)} pixels")
        self.calls += 1
        return [f"image {number}, {json.dumps(box)}: ", picture[top:bottom, left:right]]


def _whole(value: Any, what: str) -> int:
    """A whole number that a call may also have as a text."""
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
        if number == int(number) and abs(number) < 1e9:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ToolError(f"{what} is no whole number")


def _box(value: Any) -> list[int]:
    try:
        box = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        box = None
    if not isinstance(box, list) or len(box) != 4:
        raise ToolError("box is no list of four numbers")
    return [min(max(_whole(entry, "a number of the box"), 0), SCALE) for entry in box]
