"""Settings compared over seeds: which one won, whether the difference is more than chance, and curves with their intervals.

A setting's n runs differ in `seed` alone. Two settings are compared with a permutation test of the difference of their means:
under the hypothesis that they are the same, every way to deal the n1 + n2 results to them is as likely. It assumes no
distribution, and it says by itself when there are too few seeds: 3 and 3 have 20 ways, so that no p can be below 0.1.
Comparisons of the best setting with each other one are corrected after Holm. That the best was chosen by looking is what no
correction makes good for.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import dataclass

LEVEL = 0.05
EXACT_DEALS = 50_000  # more ways than these are sampled
SAMPLED_DEALS = 20_000
# 97.5% quantiles of Student's t at 1, 2, ... degrees of freedom, by which a mean's 95% interval is so many standard errors wide
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
    2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A setting, its results by seed, and how it compares with the best: `p` after Holm's correction; None for the best itself
    and where one of the two has a single seed."""

    label: str
    values: tuple[float, ...]
    p: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def interval(values: tuple[float, ...]) -> tuple[float, float] | None:
    """The 95% interval of the mean after Student; None for a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    wide = T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else T_QUANTILES[-1]  # a little too wide for more
    half = wide * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def permutation_p(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Two-sided p of the difference of means: the share of deals with at least that difference. Exact up to EXACT_DEALS."""
    together = (*a, *b)
    total, count = math.fsum(together), len(a)
    found = abs(statistics.fmean(a) - statistics.fmean(b))
    slack = 1e-9 * max(map(abs, together), default=0.0)

    def as_far(dealt: float) -> bool:
        return abs(dealt / count - (total - dealt) / len(b)) >= found - slack

    if math.comb(len(together), count) <= EXACT_DEALS:
        deals = [as_far(math.fsum(deal)) for deal in itertools.combinations(together, count)]
        return sum(deals) / len(deals)
    draw = random.Random(0)
    hits = sum(as_far(math.fsum(draw.sample(together, count))) for _ in range(SAMPLED_DEALS))
    return (hits + 1) / (SAMPLED_DEALS + 1)


def least_p(n1: int, n2: int) -> float:
    """The least p that so many seeds can give."""
    return (2 if n1 == n2 else 1) / math.comb(n1 + n2, n1)


def compared(settings: dict[str, tuple[float, ...]]) -> list[Compared]:
    """The settings by falling mean, each with its p against the first. Needs one value of each at least."""
    order = sorted((Compared(label, values) for label, values in settings.items()), key=lambda s: -s.mean)
    best, *rest = order
    tested = {s.label: permutation_p(best.values, s.values) for s in rest if min(len(best.values), len(s.values)) > 1}
    corrected: dict[str, float] = {}
    highest = 0.0
    for rank, label in enumerate(sorted(tested, key=lambda label: tested[label])):  # Holm: the least p has the most to bear
        highest = max(highest, min(1.0, (len(tested) - rank) * tested[label]))
        corrected[label] = highest
    return [best, *(Compared(s.label, s.values, corrected.get(s.label)) for s in rest)]


def verdict(order: list[Compared], metric: str) -> str:
    """Which setting won and whether that is significant, in sentences."""
    best, *rest = order
    told = f"{best.label} has the highest mean of {metric}: {best.mean:.4g} over {_seeds(len(best.values))}."
    if not rest:
        return f"{told} There is no other setting to compare with."
    single = [s for s in rest if s.p is None]
    if len(single) == len(rest):
        return f"{told} Nothing can be said of significance: two seeds at least of each setting are needed, five are better."
    tested = [s for s in rest if s.p is not None]
    better = [s for s in tested if s.p is not None and s.p <= LEVEL]
    others = [s for s in tested if s not in better]
    sentences = [told]
    if better:
        sentences.append(f"Significantly better than {_listed(better)}.")
    if others:
        sentences.append(f"Not significantly better than {_listed(others)}.")
    few = [s for s in others if len(tested) * least_p(len(best.values), len(s.values)) > LEVEL]
    if few:
        needed = next(n for n in itertools.count(2) if len(tested) * least_p(n, n) <= LEVEL)
        fewest = min(len(s.values) for s in (best, *few))
        sentences.append(
            f"Too few seeds: with {fewest} no difference, however large, could be significant at {LEVEL:g} in every comparison; "
            f"{needed} of each setting could show one."
        )
    if single:
        sentences.append(f"Not tested, for one seed only: {', '.join(s.label for s in single)}.")
    sentences.append(
        f"Permutation test over seeds, two-sided, Holm's correction for {len(tested)} comparison(s), level {LEVEL:g}."
    )
    return " ".join(sentences)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _listed(settings: list[Compared]) -> str:
    return ", ".join(f"{s.label} ({s.mean:.4g}, n={len(s.values)}, p={s.p:.2g})" for s in settings)


def mean_curve(
    curves: list[list[tuple[float, float]]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """((step, mean), (step, low, high) of its 95% interval) over the seeds' curves, at steps that all of them have."""
    tables = [{x: y for x, y in curve if math.isfinite(y)} for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    points, band = [], []
    for step in steps:
        values = tuple(table[step] for table in tables)
        points.append((step, statistics.fmean(values)))
        if (found := interval(values)) is not None:
            band.append((step, *found))
    return points, band
