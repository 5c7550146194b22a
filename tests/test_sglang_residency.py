"""The residency check over ranks: what a loader may do with a tensor, and what it must not. Needs torch alone; real engines are
in tests/sglang_servers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.rollout.sglang.plugin.residency import check, fingerprint, of_all_ranks

Share = Callable[[torch.Tensor, int], torch.Tensor | None]
NAME = "model.layers.0.proj.weight"


class Rank(torch.nn.Module):
    """Holds what `share` gives it of every tensor that is loaded."""

    def __init__(self, rank: int, share: Share, dtype: torch.dtype) -> None:
        super().__init__()
        self._rank, self._share = rank, share
        mine = share(torch.zeros(8, 6), rank)
        layer = torch.nn.Module()
        layer.stacked = torch.nn.Parameter(torch.zeros_like(mine, dtype=dtype) if mine is not None else torch.zeros(0))
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([layer])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            mine = self._share(tensor, self._rank)
            if mine is not None:
                self.get_parameter("model.layers.0.stacked").data.copy_(mine)


def problems(share: Share, ranks: int = 2, dtype: torch.dtype = torch.float32) -> list[str]:
    tensor = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    held, found = [], []
    for rank in range(ranks):
        model = Rank(rank, share, dtype)
        model.load_weights([(NAME, tensor)])
        alone, of_rank = check(model, [(NAME, tensor)])
        found += alone
        held.append(of_rank)
    return found + of_all_ranks(held)


@pytest.mark.parametrize(
    "share",
    [
        lambda tensor, rank: tensor.chunk(2)[rank],  # by rows
        lambda tensor, rank: tensor.chunk(2, 1)[rank].t(),  # by columns, transposed
        lambda tensor, rank: tensor,  # a copy on each
        lambda tensor, rank: tensor[:3] if rank == 0 else tensor[3:],  # unevenly, as a padded vocabulary
        lambda tensor, rank: tensor if rank == 1 else None,  # an expert of the second rank
    ],
)
def test_shards_and_copies_are_right(share: Share) -> None:
    assert problems(share) == []


@pytest.mark.promise("engines of several ranks: shards, experts and transports")
@pytest.mark.parametrize(
    ("share", "message"),
    [
        (lambda tensor, rank: tensor.chunk(2)[0], "shards overlap"),  # both ranks took the first half
        (lambda tensor, rank: tensor[:5] if rank == 0 else tensor[4:], "has 48 values, but 54 resident values"),
        (lambda tensor, rank: tensor[:4] if rank == 0 else tensor[5:], "has 48 values, but 42 resident values"),
        (lambda tensor, rank: None, "has 48 values, but 0 resident values follow it on 2 ranks"),
    ],
)
def test_overlaps_gaps_and_lost_tensors_are_named(share: Share, message: str) -> None:
    (problem,) = problems(share)
    assert problem.startswith(NAME) and message in problem


def test_one_rank_holds_all_of_it_once() -> None:
    assert problems(lambda tensor, rank: tensor, ranks=1) == []
    (problem,) = problems(lambda tensor, rank: torch.cat([tensor, tensor]), ranks=1)
    assert "has 48 values, but 96 resident values follow it" in problem


def test_a_wider_resident_dtype_is_no_difference() -> None:
    assert problems(lambda tensor, rank: tensor.chunk(2)[rank], dtype=torch.float64) == []


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=40), st.integers(0, 2**32), st.integers(1, 39))
def test_fingerprints_of_shares_add_up_in_any_order(values: list[int], seed: int, cut: int) -> None:
    whole = torch.tensor(values, dtype=torch.int32)
    mixed = whole[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    shares = mixed[:cut], mixed[cut:]
    assert sum(fingerprint(share) for share in shares) % (1 << 64) == fingerprint(whole)
    other = whole.clone()
    other[0] ^= 1
    assert fingerprint(other) != fingerprint(whole)
