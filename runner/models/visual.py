"""Features of images in the middle of token batches: one way for the trainer (with gradients) and the in-process engine.

The visual tower is transformers' own module. It computes every distinct image of a call once, however many rows show it.

Shape legend: M image tokens of a call, H hidden size of the decoder, D deepstack layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from runner.models.images import Images, extents, rotary_positions


@dataclass(frozen=True)
class Placed:
    """Features of image tokens and where they go.

    where      [M] int64 places in the flat token batch, ascending
    embeds     [M, H] what stands there instead of token embeddings
    deepstack  D tensors [M, H]: the d-th is added there to the output of decoder layer d
    """

    where: torch.Tensor
    embeds: torch.Tensor
    deepstack: list[torch.Tensor]


class ImageFeatures:
    """What the tower says about the distinct images of these sequences; equal objects are one image."""

    def __init__(self, visual: nn.Module, images: Sequence[Images]) -> None:
        distinct = {id(image): image for shown in images for image in shown}
        self._first: dict[int, int] = {}  # id of an image -> its first row
        self.embeds: torch.Tensor | None = None
        if not distinct:
            return
        total = 0
        for key, image in distinct.items():
            self._first[key] = total
            total += image.tokens
        weight = next(visual.parameters())
        patches = torch.cat([image.patches() for image in distinct.values()]).to(weight.device, weight.dtype)
        grids = torch.tensor([image.grid_thw for image in distinct.values()], device=weight.device)
        output = visual(patches, grid_thw=grids)
        self.embeds, self.deepstack = output.pooler_output, list(output.deepstack_features)

    def placed(self, images: Sequence[Images], first: Sequence[int], stop: Sequence[int], base: Sequence[int]) -> Placed | None:
        """The features of rows that hold tokens [first, stop) of their sequences at flat places base, base + 1, ...

        None when no image token lies in them.
        """
        where, rows = [], []
        for shown, low, high, flat in zip(images, first, stop, base, strict=True):
            for image in shown:
                begin, end = max(image.start, low), min(image.start + image.tokens, high)
                if begin < end:
                    where.append(np.arange(begin, end) - low + flat)
                    rows.append(np.arange(begin, end) - image.start + self._first[id(image)])
        if not where:
            return None
        assert self.embeds is not None
        index = torch.from_numpy(np.concatenate(rows)).to(self.embeds.device)
        return Placed(
            where=torch.from_numpy(np.concatenate(where)).to(self.embeds.device),
            embeds=self.embeds.index_select(0, index),
            deepstack=[layer.index_select(0, index) for layer in self.deepstack],
        )


def hidden_states(model: nn.Module, tokens: torch.Tensor, images: Sequence[Images]) -> torch.Tensor:
    """[B, W, H] after the last norm of right-padded token rows [B, W], each with the images that it shows, if any.

    The same sum as transformers' own forward with pixels. Two things differ: an image is encoded once for all rows that show
    it, and placeholders that a policy has sampled itself stay ordinary tokens.
    """
    rows, width = tokens.shape
    decoder = model.get_decoder()  # type: ignore[operator]
    features = ImageFeatures(model.base_model.visual, images)  # type: ignore[union-attr, arg-type]
    placed = features.placed(images, [0] * rows, [width] * rows, [row * width for row in range(rows)])
    assert placed is not None
    embeds = decoder.embed_tokens(tokens)
    mask = torch.zeros(rows * width, dtype=torch.bool, device=tokens.device)
    mask[placed.where] = True
    places = rotary_positions(np.arange(width)[None], extents(images)[:, None])
    output = decoder(
        inputs_embeds=embeds.flatten(0, 1).index_copy(0, placed.where, placed.embeds.to(embeds.dtype)).view_as(embeds),
        position_ids=torch.from_numpy(places).to(tokens.device),
        visual_pos_masks=mask.view(rows, width),
        deepstack_visual_embeds=placed.deepstack,
        use_cache=False,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
