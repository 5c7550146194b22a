"""Micro-batches balanced by tokens over data-parallel ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.megatron  # the module imports megatron-core


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(16, 512), st.integers(1, 5))
def test_every_sample_once_within_the_limit_and_as_many_micro_batches_on_every_rank(
    lengths: list[int], limit: int, ranks: int
) -> None:
    from runner.trainer.megatron.shares import balance

    shares = balance(lengths, limit, ranks)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1  # a rank without one would leave a collective
    assert sorted(index for share in shares for micro in share for index in micro) == list(range(len(lengths)))
    for micro in (micro for share in shares for micro in share):
        assert len(micro) <= 1 or sum(lengths[index] for index in micro) <= limit


@given(st.integers(0, 2**32 - 1))
def test_ranks_get_about_the_same_tokens(seed: int) -> None:
    """Lengths of rollouts, 8 to 128, 32 per rank: the fullest rank has at most a sample more than the emptiest."""
    import random

    from runner.trainer.megatron.shares import balance

    lengths = random.Random(seed).choices(range(8, 129), k=128)
    loads = [sum(lengths[index] for micro in share for index in micro) for share in balance(lengths, 1024, 4)]
    assert max(loads) - min(loads) <= 128
