"""Samples balanced by tokens over data-parallel ranks, as packed micro-batches. The driver divides: no Megatron is needed.

A message holds what one data-parallel rank computes; its tensor-, context- and pipeline-parallel ranks get the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from runner.cluster.placement import coordinates
from runner.config.schema import Config
from runner.trainer.megatron import arguments
from runner.trainer.share import Share

T = TypeVar("T")


@dataclass(frozen=True)
class Geometry:
    """What a length must be a multiple of: samples for context parallelism, the whole for sequence parallelism."""

    tp: int
    cp: int
    sequence_parallel: bool

    @classmethod
    def of(cls, cfg: Config) -> Geometry:
        par = cfg.parallelism
        return cls(par.tp, par.cp, par.sequence_parallel)

    @property
    def sample_multiple(self) -> int:
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def total_multiple(self) -> int:
        return math.lcm(self.sample_multiple, self.tp * self.cp if self.sequence_parallel else 1)

    def padded(self, length: int) -> int:
        return -(-length // self.sample_multiple) * self.sample_multiple


def balance(lengths: Sequence[int], max_tokens: int, ranks: int) -> list[list[list[int]]]:
    """[rank][micro-batch] -> sample indices: equally many micro-batches per rank, of similar size and at most `max_tokens`.

    Longest samples first, each into the emptiest micro-batch (LPT). A sample longer than `max_tokens` is alone in one.
    Some micro-batches are empty when there are fewer samples than ranks.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    each = max(1, math.ceil(sum(lengths) / (ranks * max_tokens)))
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * each)]
        loads = [0] * len(bins)
        for index in order:
            target = min(range(len(bins)), key=loads.__getitem__)
            bins[target].append(index)
            loads[target] += lengths[index]
        if all(load <= max_tokens or len(chosen) == 1 for load, chosen in zip(loads, bins, strict=True)):
            break
        each += 1
    heaviest = sorted(range(len(bins)), key=lambda i: -loads[i])
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    for place, index in enumerate(heaviest):
        turn, position = divmod(place, ranks)
        result[position if turn % 2 == 0 else ranks - 1 - position].append(bins[index])
    return result


@dataclass(frozen=True)
class Division:
    """How a config's ranks share samples."""

    cfg: Config

    def divide(self, lengths: Sequence[int]) -> list[Share]:
        """`runner.trainer.share.Divide`."""
        geometry, par = Geometry.of(self.cfg), self.cfg.parallelism
        limit = arguments.trainer_config(self.cfg).max_tokens_per_gpu * par.cp
        ranks = par.ranks // (par.tp * par.cp * par.pp)
        return [_share(micros) for micros in balance([geometry.padded(length) for length in lengths], limit, ranks)]

    def by_rank(self, parts: Sequence[T]) -> list[T]:
        """What every rank gets, given what every data-parallel rank gets."""
        par = self.cfg.parallelism
        sizes = {"tp": par.tp, "cp": par.cp, "pp": par.pp, "ep": par.ep, "etp": par.etp}
        return [parts[coordinates(rank, ranks=par.ranks, **sizes).dp] for rank in range(par.ranks)]


def _share(micros: list[list[int]]) -> Share:
    indices = sorted(index for micro in micros for index in micro)
    place = {index: position for position, index in enumerate(indices)}
    return Share(indices, [[place[index] for index in micro] for micro in micros])
