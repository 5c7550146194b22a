"""Which setting of a sweep won, and whether that is more than chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from scipy import stats

from runner.tracking import charts, folder, report, seeds
from runner.tracking.tracker import JsonlTracker

GOOD, BAD = (0.80, 0.82, 0.84, 0.81, 0.85), (0.60, 0.64, 0.62, 0.65, 0.61)


@pytest.mark.parametrize(("a", "b"), [(GOOD, BAD), ((1.0, 5.0, 2.0), (3.0, 4.0, 2.5, 0.5)), ((0.1, 0.1, 0.1), (0.1, 0.1))])
def test_p_is_that_of_scipy(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    theirs = stats.permutation_test(
        (a, b), lambda x, y: abs(x.mean(-1) - y.mean(-1)) + 0.0, vectorized=False, alternative="greater"
    )
    assert seeds.permutation_p(a, b) == pytest.approx(theirs.pvalue, abs=1e-12)


def test_sampled_deals_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (1.0, 5.0, 2.0, 3.5), (3.0, 4.0, 2.5, 4.5)
    exact = seeds.permutation_p(a, b)
    monkeypatch.setattr(seeds, "EXACT_DEALS", 0)
    assert seeds.permutation_p(a, b) == pytest.approx(exact, abs=0.02) and 0 < seeds.permutation_p(GOOD * 4, BAD * 4) < 1e-4


def test_intervals_are_students() -> None:
    for count in (2, 5, 31):
        values = tuple(math.sin(i) for i in range(count))
        low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
        assert seeds.interval(values) == pytest.approx((low, high), rel=1e-3)
    assert seeds.interval((1.0,)) is None


def test_the_least_p_is_reached_when_nothing_overlaps() -> None:
    assert seeds.permutation_p(GOOD, BAD) == pytest.approx(seeds.least_p(5, 5)) == pytest.approx(2 / 252)
    assert seeds.permutation_p((9.0, 8.0), (1.0, 1.1, 1.2)) == pytest.approx(seeds.least_p(2, 3))


def test_comparisons_are_corrected_after_holm() -> None:
    settings = {"bad": BAD, "good": GOOD, "near": (0.79, 0.83, 0.85, 0.80, 0.82)}
    best, near, bad = seeds.compared(settings)
    assert [s.label for s in (best, near, bad)] == ["good", "near", "bad"] and best.p is None
    assert bad.p == pytest.approx(2 * seeds.permutation_p(GOOD, BAD))
    assert near.p == pytest.approx(seeds.permutation_p(GOOD, settings["near"]))
    said = seeds.verdict([best, near, bad], "reward")
    assert "Significantly better than bad (0.624, n=5, p=0.016)" in said and "Not significantly better than near" in said
    assert "Too few" not in said and "Permutation test" in said and "for 2 comparison(s)" in said


def test_too_few_seeds_are_called_that() -> None:
    said = seeds.verdict(seeds.compared({"a": GOOD[:3], "b": BAD[:3]}), "reward")
    assert (
        "Not significantly better than b (0.62, n=3, p=0.1)" in said and "Too few seeds: with 3" in said and "4 of each" in said
    )
    said = seeds.verdict(seeds.compared({"a": (0.9,), "b": (0.1,)}), "reward")
    assert "Nothing can be said of significance" in said and "0.9 over 1 seed." in said
    assert "Not tested, for one seed only: c" in seeds.verdict(seeds.compared({"a": GOOD, "b": BAD, "c": (0.1,)}), "reward")
    assert "no other setting" in seeds.verdict(seeds.compared({"a": GOOD}), "reward")


def test_a_mean_curve_has_the_steps_that_all_seeds_have() -> None:
    points, band = seeds.mean_curve([[(1, 1.0), (2, 2.0), (3, math.nan)], [(1, 3.0), (2, 2.0), (3, 1.0)]])
    assert points == [(1, 2.0), (2, 2.0)] and band[1] == (2, 2.0, 2.0)
    assert band[0][1] == pytest.approx(2 - 12.706, abs=1e-3) and seeds.mean_curve([]) == ([], [])
    assert seeds.mean_curve([[(1, 1.0)]]) == ([(1, 1.0)], [])


def make(path: Path, value: float, seed: int, size: int, state: str = "completed") -> Path:
    tracker = JsonlTracker(path)
    for step in range(3):
        tracker.log(step, {"rollout/raw_reward": value + step / 1000})
    config = {"seed": seed, "task": {"seed": seed}, "precision": {"group_size": size}}  # a task's seed is the run's
    (path / "resolved.yaml").write_text(yaml.safe_dump(config))
    folder.write_status(path, state, step=3)  # type: ignore[arg-type]
    return path


def test_a_sweeps_page_answers(tmp_path: Path) -> None:
    runs = [make(tmp_path / f"good{seed}", value, seed, 32) for seed, value in enumerate(GOOD)]
    runs += [make(tmp_path / f"bad{seed}", value, seed, 128) for seed, value in enumerate(BAD)]
    runs.append(make(tmp_path / "dead", 9.0, 6, 128, "failed"))
    text = report.write_comparison(runs, tmp_path / "page.html", "t").read_text()
    assert (
        "precision.group_size=32 has the highest mean of rollout/raw_reward (last 5 values of a run): 0.825 over 5 seeds." in text
    )
    assert "Significantly better than precision.group_size=128 (0.625, n=5, p=0.0079)" in text and "1 run(s) that did not" in text
    assert text.count('<path class="band"') >= 2
    one = report.write_comparison(runs[:3], tmp_path / "one.html", "t").read_text()
    assert "Which setting won" not in one and 'band" d' not in one  # seeds of one setting are not settings


def test_a_band_lies_where_its_numbers_are() -> None:
    series = charts.Series("a", [(1, 1.0), (2, 1.0), (3, 1.0)], 0, [(1, 0.0, 2.0), (3, 0.0, 2.0)])
    text = charts.line_chart("t", [series])
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    assert f'd="M{left:.1f} {top:.1f}L{right:.1f} {top:.1f}L{right:.1f} {bottom:.1f}L{left:.1f} {bottom:.1f}Z"' in text
