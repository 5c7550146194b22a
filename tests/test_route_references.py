"""Routes by reference: pieces, rows and layers of what lies elsewhere are those of the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.routing.reference import Part, RouteRef, head, joined, pick
from runner.routing.routes import packed_layout
from tests.trainer_configs import batch, config


@dataclass
class There:
    """Counts how often somebody fetches it."""

    rows: np.ndarray
    fetched: int = 0

    def array(self) -> np.ndarray:
        self.fetched += 1
        return self.rows


def reference(rows: torch.Tensor, *cuts: int) -> RouteRef:
    """The rows as parts that end at these places; each part holds three rows more than it is said to have."""
    parts = []
    for start, stop in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        held = There(np.concatenate([rows[start:stop].numpy(), np.zeros((3, *rows.shape[1:]), rows.numpy().dtype)]))
        parts.append(Part(held, stop - start))
    return RouteRef(tuple(parts))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@given(st.lists(st.integers(0, 19), min_size=1, unique=True), st.lists(st.integers(0, 4), min_size=1, unique=True))
def test_picked_rows_and_layers_are_those_of_the_tensor(dtype: torch.dtype, rows: list[int], layers: list[int]) -> None:
    whole = torch.arange(20 * 5 * 2).view(20, 5, 2)
    expected = whole[rows][:, layers]
    places = torch.tensor(rows)
    for routes in (whole.to(dtype), reference(whole.to(dtype), 4, 4, 11)):
        found = pick(routes, places, layers)
        assert found.dtype is dtype and torch.equal(found.long(), expected)


def test_only_parts_with_wanted_rows_are_fetched() -> None:
    whole = torch.arange(20 * 2).view(20, 2, 1).to(torch.uint8)
    routes = reference(whole, 5, 9)
    assert torch.equal(pick(routes, torch.tensor([17, 0, 10]), [1]), whole[[17, 0, 10]][:, [1]])
    assert [part.held.fetched for part in routes.parts if isinstance(part.held, There)] == [1, 0, 1]


@given(st.integers(0, 20))
def test_heads_and_joined_parts_are_those_of_the_tensor(rows: int) -> None:
    whole = torch.arange(20 * 2).view(20, 2, 1).to(torch.uint8)
    first, second = reference(whole, 5, 9), reference(whole, 12)
    both = joined([head(first, rows), second])
    assert isinstance(both, RouteRef) and len(both) == rows + 20 and len(head(first, rows)) == rows
    assert torch.equal(both.fetch(), torch.cat([whole[:rows], whole]))
    assert torch.equal(joined([head(whole, rows), second]), torch.cat([whole[:rows], whole]))


def test_a_ranks_tokens_and_layers_get_the_routes_of_the_whole_batch() -> None:
    """As ranks of context, sequence and pipeline parallelism cut it."""
    samples = batch(config(), size=3, routes=True).samples
    starts, total = [0, 20, 40], 64
    whole, recorded = packed_layout(samples, starts, torch.arange(total), [0, 1], 2, 4)
    assert int(recorded.sum()) == sum(len(sample.tokens) - 1 for sample in samples)
    for sample in samples:
        assert isinstance(sample.routes, torch.Tensor)
        sample.routes = reference(sample.routes, 3)
    for rows, layers in ((torch.arange(16, 48), [1]), (torch.tensor([63, 2, 21, 22]), [0, 1]), (torch.arange(12, 18), [0])):
        found, known = packed_layout(samples, starts, rows, layers, 2, 4)
        assert torch.equal(found, whole[layers][:, rows]) and torch.equal(known, recorded[rows])
