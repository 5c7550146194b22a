"""Images that environments and tools answer with: what is looked at before a model sees one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from runner.models.pictures import MAX_PIXELS, resized
from runner.turns.failure import Failed

if TYPE_CHECKING:
    from runner.models.images import ImageProcessor

SHOWN = "<image>"  # stands for an image in a text that people read


@dataclass(frozen=True)
class Pictures:
    """How a conversation takes images.

    most        images of one conversation, those of its prompt included
    min_pixels, max_pixels   what an image is resized to, in whole tokens
    """

    processor: ImageProcessor
    most: int
    min_pixels: int
    max_pixels: int

    def pixels(self, given: object) -> np.ndarray:
        """uint8 [H, W, 3] in whole tokens, of a PIL image or an array uint8 [H, W, 3]. Failed for what is too large, far too
        long, or cannot be decoded."""
        try:
            image = _opened(given)
            return resized(image, *self.processor.fitted_size(image.height, image.width, self.min_pixels, self.max_pixels))
        except (ValueError, OSError) as error:  # Pillow opens files lazily: pixels are read here
            raise Failed("image", f"an image of the environment's cannot be shown: {error}") from None


def _opened(given: object) -> Image.Image:
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[2] != 3:
            raise ValueError(f"it is an array {given.dtype} {list(given.shape)}, not uint8 [height, width, 3]")
        _small_enough(given.shape[1], given.shape[0])
        return Image.fromarray(given)
    assert isinstance(given, Image.Image)
    _small_enough(*given.size)
    return given.convert("RGB")


def _small_enough(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS}")


def parts_of(seen: object) -> Sequence[object]:
    """The texts and images of an observation: a text, an image, or a list of both."""
    return seen if isinstance(seen, list) else [seen]


def is_image(part: object) -> bool:
    return isinstance(part, np.ndarray | Image.Image)


def text_of(seen: object) -> str:
    """An observation as people read it; "" for what is none."""
    return "".join(part if isinstance(part, str) else SHOWN if is_image(part) else "" for part in parts_of(seen))
