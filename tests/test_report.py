"""The report: self-contained, complete, safe, and right about the numbers it shows."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from runner.__main__ import main
from runner.errors import UserError
from runner.tracking import charts, folder, report
from runner.tracking.tracker import JsonlTracker


def make_run(path: Path, *, steps: int = 20, reward: float = 0.5, group_size: int = 32) -> Path:
    tracker = JsonlTracker(path)
    for step in range(steps):
        metrics = {
            "rollout/raw_reward": reward + step / 100,
            "train/train_rollout_logprob_abs_diff": 0.007,
            "perf/step_time": 1.0,
        }
        metrics |= {"perf/rollout_time": 0.4, "perf/train_time": 0.5, "something/new": float(step)}
        if step % 5 == 0:
            metrics |= {"mismatch/quantization": -0.02, "mismatch/routing": 0.01, "mismatch/numerics": 0.001}
            metrics |= {"eval/x": 0.5 + step / 100, "eval/x_response_len": 30.0}
            tracker.log_samples(step, [{"prompt": "1+1=", "response": "<script>alert(1)</script>", "reward": 1.0}])
        tracker.log(step, metrics)
    tracker.event("watch_warn", "mismatch <jumped>", {})
    (path / "resolved.yaml").write_text(
        yaml.safe_dump({"seed": 3, "steps": steps, "precision": {"name": "int4_qat", "group_size": group_size}})
    )
    folder.write_status(path, "completed", step=steps)
    return path


class Page(HTMLParser):
    """Collects tags and attributes; complains about tags that do not match."""

    VOID = ("meta", "br", "line", "circle", "rect", "path", "i")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def charts_of(text: str) -> dict[str, dict]:
    return {attrs["aria-label"]: json.loads(attrs["data-chart"]) for tag, attrs in Page(text).tags if tag == "svg"}


def test_report_is_one_file_without_network(tmp_path: Path) -> None:
    text = report.write_report(make_run(tmp_path / "run")).read_text()
    page = Page(text)
    assert not [tag for tag, attrs in page.tags if tag in ("link", "img", "iframe") or "src" in attrs or "href" in attrs]
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text and "@import" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1  # a sample's text does not become one
    assert "&lt;script&gt;alert(1)" in text and "mismatch &lt;jumped&gt;" in text


def test_report_shows_every_metric_with_its_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shown = charts_of(report.write_report(run).read_text())
    reward = next(s for s in shown["Reward and evaluation"]["series"] if s["label"] == "raw reward")
    assert reward["points"] == [[step + 1, pytest.approx(0.5 + step / 100)] for step in range(20)]
    assert [s["label"] for s in shown["Reward and evaluation"]["series"]] == ["raw reward", "x"]
    assert [s["label"] for s in shown["Where the mismatch comes from"]["series"]] == ["quantization", "routing", "numerics"]
    rest = next(s for s in shown["Time per step"]["series"] if s["label"] == "rest")
    assert rest["points"][0][1] == pytest.approx(0.1)
    assert "something/new" in shown  # a metric that no card names is still there


def test_key_results(tmp_path: Path) -> None:
    results = report.key_results(report.read_run(make_run(tmp_path / "run")))
    assert results["reward"] == pytest.approx(0.5 + 0.17) and results["eval"] == pytest.approx(0.65)
    assert results["mismatch"] == pytest.approx(0.007) and results["step_time"] == 1.0 and "seconds" in results


def test_empty_and_broken_runs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run"):
        report.read_run(tmp_path / "empty")
    folder.write_status(tmp_path / "empty", "failed", step=0, message="died early")
    assert "died early" in report.write_report(tmp_path / "empty").read_text()
    tracker = JsonlTracker(tmp_path / "nan")
    tracker.log(0, {"rollout/raw_reward": math.nan, "train/grad_norm": math.inf})
    tracker.log(1, {"rollout/raw_reward": 0.5, "train/grad_norm": math.inf})
    text = report.write_report(tmp_path / "nan").read_text()
    assert charts_of(text)["Reward and evaluation"]["series"][0]["points"] == [[1, None], [2, 0.5]]


def test_comparison_shows_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in (32, 64, 128):
        make_run(tmp_path / "sweep" / f"group_size={size}", reward=size / 200, group_size=size)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    path = Path(capsys.readouterr().out.strip())
    text = path.read_text()
    assert path == tmp_path / "sweep" / "comparison.html"
    assert "Nothing can be said of significance" in text  # a seed each
    header, *rows = re.findall(r"<tr>(.*?)</tr>", text[text.rindex("<table") :])
    assert re.findall(r"<th>(.*?)</th>", header)[:4] == ["run", "state", "precision.group_size", "reward"]  # the seed is equal
    assert [re.findall(r"<td>(.*?)</td>", row)[2:4] for row in rows] == [["32", "0.33"], ["64", "0.49"], ["128", "0.81"]]
    assert [s["label"] for s in charts_of(text)["Reward"]["series"]] == [f"group_size={size}" for size in (32, 64, 128)]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()
    assert main(["report", str(run), str(run), "--out", str(tmp_path / "two.html")]) == 0 and (tmp_path / "two.html").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "no run named" in capsys.readouterr().err


# ---- drawing


def test_drawn_points_lie_where_the_axes_say() -> None:
    text = charts.line_chart("t", [charts.Series("a", [(1, 0.0), (2, 5.0), (3, 10.0)], 0)])
    svg = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    path = next(element for element in svg if element.tag == "path")
    numbers = [float(x) for x in re.findall(r"[\d.]+", path.attrib["d"])]
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    assert numbers == [
        charts.LEFT,
        bottom,
        (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2,
        (bottom + top) / 2,
        charts.WIDTH - charts.RIGHT,
        top,
    ]


def test_stacked_parts_add_up_on_both_sides_of_zero() -> None:
    series = [charts.Series("a", [(1, 3.0)], 0), charts.Series("b", [(1, 1.0)], 1), charts.Series("c", [(1, -2.0)], 2)]
    text = charts.stacked_bars("t", series)
    boxes = [(float(y), float(h)) for y, h in re.findall(r'<rect x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', text)]
    (a_top, a_height), (b_top, b_height), (c_top, c_height) = boxes
    assert a_height == pytest.approx(3 * b_height, abs=0.3) and c_height == pytest.approx(2 * b_height, abs=0.3)
    assert b_top + b_height == pytest.approx(a_top, abs=0.2) and a_top + a_height == pytest.approx(c_top, abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0061, 0.0079), (-3e-4, 2e-4), (5, 5), (0, 0), (1e9, 3e9), (-7, -7)])
def test_ticks_are_few_round_and_enclose(low: float, high: float) -> None:
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1] and 2 <= len(ticks) <= 8
    assert all(len(charts.format_number(round(tick, 12))) <= 7 for tick in ticks)


def test_long_curves_are_thinned_to_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.MAX_POINTS and all(abs(y - 0.5) < 0.06 for _, y in thinned)
