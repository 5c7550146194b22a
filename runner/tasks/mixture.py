"""The endless order in which training draws problems: of one data set, or of several by weight.

Everything is a function of the position, the number of problems drawn before. Positions are shared out by a pattern that
repeats: weights 3 and 1 are `a a b a`, whose every piece is as close to the weights as whole problems can be. Within a set each
epoch is a permutation of its own, so a small set with a large weight comes around more often, and is never drawn twice within
an epoch.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction

from runner.tasks.seeding import stream

MAX_PATTERN = 100_000


def shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, taken as they are written: 0.7 and 0.3 are 7 and 3.

    ValueError where their sum is above MAX_PATTERN.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    whole = [count // math.gcd(*whole) for count in whole]
    if sum(whole) > MAX_PATTERN:
        raise ValueError(f"weights {', '.join(map(str, weights))} repeat after {sum(whole)} problems, {MAX_PATTERN} are allowed")
    return whole


class Mixture:
    """Positions -> problems, as numbers over all sets laid end to end. `name` and `seed` are the task's."""

    def __init__(self, sizes: Mapping[str, int], weights: Sequence[float], name: str, seed: int) -> None:
        """Set name -> problems, in the order of the weights; one set alone may be called ''."""
        self.sizes, self._name, self._seed = dict(sizes), name, seed
        self._starts = [sum(list(sizes.values())[:index]) for index in range(len(sizes))]
        self._shares = shares(weights)
        self._length = sum(self._shares)
        self._turns = self._pattern()
        self._origin, self._begun = 0, [0] * len(self.sizes)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def continue_at(self, position: int, drawn: Mapping[str, int]) -> None:
        """From this position on sets go on after the problems that were drawn of them."""
        self._origin, self._begun = position, [drawn.get(name, 0) for name in self.sizes]

    def at(self, position: int) -> int:
        """The problem at a position."""
        index = self._set_at(position)
        name = list(self.sizes)[index]
        epoch, offset = divmod(self._drawn(index, position), self.sizes[name])
        if self._orders.get(name, (-1, []))[0] != epoch:
            self._orders[name] = (epoch, self._shuffled(name, list(range(self.sizes[name])), "epoch", epoch))
        return self._starts[index] + self._orders[name][1][offset]

    def others(self, position: int, count: int, used: set[int], *key: int | str) -> list[int]:
        """`count` problems besides those in `used`, as long as a set has any, for these positions; drawn by `key`."""
        rest: dict[int, list[int]] = {}
        taken = dict.fromkeys(range(len(self.sizes)), 0)
        result = []
        for index in map(self._set_at, range(position, position + count)):
            if index not in rest:
                name, start = list(self.sizes)[index], self._starts[index]
                everything = range(start, start + self.sizes[name])
                rest[index] = self._shuffled(name, [n for n in everything if n not in used] or list(everything), *key)
            result.append(rest[index][taken[index] % len(rest[index])])
            taken[index] += 1
        return result

    def drawn(self, position: int) -> dict[str, int]:
        """Set name -> problems of it that were drawn before the position, since the run began."""
        return {name: self._drawn(index, position) for index, name in enumerate(self.sizes)}

    def set_of(self, problem: int) -> str:
        return list(self.sizes)[max(index for index, start in enumerate(self._starts) if start <= problem)]

    def _pattern(self) -> list[list[int]]:
        """The places of each set in the pattern: at every place comes the set that lags most behind its share."""
        turns: list[list[int]] = [[] for _ in self._shares]
        behind = [0] * len(self._shares)
        for place in range(self._length):
            behind = [lag + share for lag, share in zip(behind, self._shares, strict=True)]
            index = behind.index(max(behind))
            behind[index] -= self._length
            turns[index].append(place)
        return turns

    def _set_at(self, position: int) -> int:
        place = position % self._length
        for index, turns in enumerate(self._turns):
            found = bisect_left(turns, place)
            if found < len(turns) and turns[found] == place:
                return index
        raise AssertionError("every place of the pattern belongs to a set")

    def _count(self, index: int, position: int) -> int:
        periods, place = divmod(position, self._length)
        return periods * self._shares[index] + bisect_left(self._turns[index], place)

    def _drawn(self, index: int, position: int) -> int:
        return self._begun[index] + self._count(index, position) - self._count(index, self._origin)

    def _shuffled(self, name: str, problems: list[int], *key: int | str) -> list[int]:
        stream(self._seed, self._name, *([name] if name else []), *key).shuffle(problems)
        return problems
