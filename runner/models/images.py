"""Images among tokens: pixels, patches, placeholder tokens and rotary positions, as Qwen3-VL's processor makes them.

An image is resized to whole tokens once, when its prompt or observation is made. Its uint8 pixels travel by reference: all
samples of a prompt, their training batch included, share its `PlacedImage`s. Patches are made where a visual tower asks for them.

Shape legend: H, W pixels; h, w tokens of an image (after merging); p patch size, m merge, t temporal patch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from runner.config.schema import ModelConfig
from runner.errors import UserError
from runner.models import family_of
from runner.models.family import VisualTower
from runner.models.vocabulary import IMAGE_ID, VISION_END_ID, VISION_START_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ASPECT = 200  # longer side over shorter side, as in Qwen's processor


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """An image at its place in a sequence of tokens.

    pixels  uint8 [H, W, 3], H and W multiples of p * m; nobody writes into it
    start   place of its first token in the sequence
    """

    pixels: np.ndarray
    start: int
    tower: VisualTower

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens (h, w); they lie at start .. start + h * w - 1, row by row."""
        side = self.tower.side
        return self.pixels.shape[0] // side, self.pixels.shape[1] // side

    @property
    def tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def extent(self) -> tuple[int, int, int]:
        """(start, h, w): what `rotary_positions` needs."""
        return self.start, *self.grid

    @property
    def grid_thw(self) -> tuple[int, int, int]:
        """Patches in time, height and width, as transformers counts them."""
        rows, columns = self.grid
        return 1, rows * self.tower.merge, columns * self.tower.merge

    def patches(self) -> torch.Tensor:
        """fp32 [h * w * m * m, 3 * t * p * p]: token by token, the m x m patches of a token together, a still image t times."""
        p, m, t = self.tower.patch_size, self.tower.merge, self.tower.temporal_patch_size
        scaled = (self.pixels * (1 / 255)).astype(np.float32)
        normal = (scaled - np.float32(self.tower.mean)) / np.float32(self.tower.std)
        rows, columns = self.grid
        cut = normal.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)  # h w m m 3 p p
        still = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], t, p, p))
        return torch.from_numpy(still.reshape(rows * columns * m * m, 3 * t * p * p))


Images = tuple[PlacedImage, ...]  # of one sequence, in the order of their places


def extents(sequences: Sequence[Images]) -> np.ndarray:
    """int64 [B, I, 3]: `PlacedImage.extent` of every image of these sequences; zeros where one has fewer than the others."""
    most = max((len(images) for images in sequences), default=0)
    found = np.zeros((len(sequences), most, 3), dtype=np.int64)
    for row, images in enumerate(sequences):
        for number, image in enumerate(images):
            found[row, number] = image.extent
    return found


def rotary_positions(place: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Positions in time, height and width [3, ...] of tokens at `place` of sequences with images of these extents [..., I, 3].

    Text counts on in all three; an image's tokens share a time, and count its rows and columns; text after it goes on at the
    largest of these plus one. `place` and the images' numbers broadcast. Without an image (zeros) a position is the place.
    """
    shape = np.broadcast_shapes(place.shape, extent.shape[:-2])
    text = np.broadcast_to(place, shape)  # positions as far as the images before a place have moved them
    found = [text, text, text]
    for start, rows, columns in np.moveaxis(extent, (-2, -1), (0, 1)):
        tokens, width = rows * columns, np.maximum(columns, 1)
        offset = place - start
        inside, after = (offset >= 0) & (offset < tokens), (offset >= tokens) & (tokens > 0)
        begin = text - offset
        text = np.where(after, text - tokens + np.maximum(rows, columns), text)
        shown = (begin, begin + offset // width, begin + offset % width)
        found = [np.where(inside, own, np.where(after, text, old)) for own, old in zip(shown, found, strict=True)]
    return np.stack(found)


@dataclass(frozen=True)
class ImageProcessor:
    """Puts an image into a prompt's tokens.

    mark      what stands for an image in a prompt's text: start of vision, one placeholder, end of vision
    token_id  the placeholder's
    """

    tower: VisualTower
    mark: str
    token_id: int

    @property
    def side(self) -> int:
        """Pixels of a token, in height and width."""
        return self.tower.side

    def place(self, tokens: Sequence[int], pixels: Sequence[np.ndarray], first: int = 0) -> tuple[list[int], Images]:
        """The tokens, each placeholder becoming as many as its image has, and the images in these places; `first`: of the
        first token in its sequence.

        ValueError when there are not as many placeholders as images.
        """
        found = [token for token in tokens if token == self.token_id]
        if len(found) != len(pixels):
            raise ValueError(f"the text has {len(found)} image placeholders, not {len(pixels)}")
        placed: list[int] = []
        images: list[PlacedImage] = []
        for token in tokens:
            if token != self.token_id:
                placed.append(token)
                continue
            images.append(PlacedImage(pixels[len(images)], first + len(placed), self.tower))
            placed += [token] * images[-1].tokens
        return placed, tuple(images)

    def at(self, tokens: Sequence[int], pixels: Sequence[np.ndarray]) -> Images:
        """The images in their order, the first of them at the first placeholder, each at the next one that no image has."""
        images: list[PlacedImage] = []
        after = 0
        for each in pixels:
            images.append(PlacedImage(each, tokens.index(self.token_id, after), self.tower))
            after = images[-1].start + images[-1].tokens
        return tuple(images)

    def fitted_size(self, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
        """Height and width in whole tokens, near the given ones, with min_pixels to max_pixels pixels, as Qwen's processor
        rounds them. ValueError for an image that is empty or far too long."""
        if not height or not width or max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"{width} x {height} pixels: one side may be at most {MAX_ASPECT} times the other")
        side = self.side
        high, wide = round(height / side) * side, round(width / side) * side
        if high * wide > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            return tuple(max(side, math.floor(length / shrink / side) * side) for length in (height, width))  # type: ignore[return-value]
        if high * wide < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            return tuple(math.ceil(length * grow / side) * side for length in (height, width))  # type: ignore[return-value]
        return high, wide


def image_processor(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> ImageProcessor:
    """The processor of a vision model; UserError for a model without a visual tower."""
    tower = family_of(model).tower(model) if model.vision else None
    if tower is None:
        raise UserError(f"{model.name} has no visual tower", key="model", fix="model=tiny_vlm")
    ids = (VISION_START_ID, IMAGE_ID, VISION_END_ID)
    if model.hf_checkpoint is not None:
        from runner.models.published import checkpoint_config

        config: Any = checkpoint_config(model)
        ids = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    mark = "".join(tokenizer.convert_ids_to_tokens(list(ids)))
    return ImageProcessor(tower, mark, ids[1])
