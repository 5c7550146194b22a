"""When the driver, the trainer's ranks and the engines did what: timeline.jsonl, and its drawing in the report.

A line of the file is a step: {"step": 0, "spans": [[lane, phase, begin, end], ...]}, in seconds since the epoch. Lanes on other
machines go by the clocks of those.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.tracking.charts import format_number, nice_ticks
from runner.tracking.folder import read_jsonl, step_problem

if TYPE_CHECKING:
    from runner.data import Sample

SHOWN_STEPS = 3
LONGEST_PAUSE = 10  # between two steps that are shown together, as a multiple of the time that the later ones took
LAST_TIME = 1e11  # seconds since the epoch: no clock is there yet
SHOWN_LANES = 64  # of thousands of ranks the first
COLORS = {"rollout": 0, "generation": 0, "train": 2, "update": 2, "sync": 3, "decompose": 4, "eval": 5}  # what belongs together
OTHER = 7
LEFT, WIDTH, LANE, AXIS = 130, 1000, 22, 24  # pixels of the drawing


@dataclass(frozen=True)
class Span:
    """`lane` was in `phase` from `begin` to `end`, in seconds since the epoch."""

    lane: str
    phase: str
    begin: float
    end: float


def served(samples: Iterable[Sample]) -> list[Span]:
    """When each engine had at least one of the samples: gaps are times without work from them."""
    by_engine: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sample in samples:
        for engine, begin, end in sample.served:
            by_engine[engine].append((begin, end))
    return [Span(engine, "generation", *piece) for engine in sorted(by_engine) for piece in _union(by_engine[engine])]


def _union(pieces: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Overlapping and touching intervals joined, ascending."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(pieces):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined


# ---- the file


def row(step: int, spans: list[Span]) -> dict[str, Any]:
    return {"step": step, "spans": [[s.lane, s.phase, round(s.begin, 4), round(s.end, 4)] for s in spans]}


def problem(found: dict[str, Any]) -> str | None:
    """What is wrong with a line."""
    spans = found.get("spans")
    if not isinstance(spans, list) or not all(map(_is_span, spans)):
        return "it has no spans"
    return step_problem(found)


def _is_span(found: Any) -> bool:
    if not isinstance(found, list) or len(found) != 4:
        return False
    times = [value for value in found[2:] if isinstance(value, int | float) and 0 <= value < LAST_TIME]
    return len(times) == 2 and all(isinstance(text, str) for text in found[:2])


def read(run_dir: Path) -> list[tuple[int, list[Span]]]:
    """(step, its spans) of the last steps, ascending; [] of a run that has no such file. UserError where it is damaged.

    A clock that was set back leaves spans without length, not of negative length.
    """
    steps: dict[int, list[Span]] = {}
    for found in read_jsonl(run_dir / "timeline.jsonl", problem):
        steps[found["step"]] = [Span(lane, phase, begin, max(begin, end)) for lane, phase, begin, end in found["spans"]]
    return _one_piece([(step, spans) for step, spans in sorted(steps.items())[-SHOWN_STEPS:] if spans])


def _one_piece(steps: list[tuple[int, list[Span]]]) -> list[tuple[int, list[Span]]]:
    """Without the steps before a pause in which these would be lost: a run that was resumed a day later."""
    ends = [(min(span.begin for span in spans), max(span.end for span in spans)) for _, spans in steps]
    for place in range(len(steps) - 1, 0, -1):
        begin, end = min(begin for begin, _ in ends[place:]), max(end for _, end in ends[place:])
        if begin - ends[place - 1][1] > LONGEST_PAUSE * (end - begin):
            return steps[place:]
    return steps


# ---- the drawing


def draw(steps: list[tuple[int, list[Span]]]) -> str:
    """A panel of HTML with a lane for the driver, each rank and each engine over the time of these steps; "" without any."""
    spans = [span for _, found in steps for span in found]
    if not spans:
        return ""
    zero, last = min(span.begin for span in spans), max(span.end for span in spans)
    lanes = sorted({span.lane for span in spans}, key=_lane_order)
    shown = lanes[:SHOWN_LANES]
    height = LANE * len(shown) + AXIS
    scale = (WIDTH - LEFT - 10) / max(last - zero, 1e-3)
    parts = [_axis(last - zero, scale, height)]
    for place, lane in enumerate(shown):
        parts.append(f'<text x="{LEFT - 8}" y="{place * LANE + 15}" text-anchor="end">{html.escape(lane)}</text>')
    for step, found in steps:
        for span in found:
            if span.lane in shown:
                parts.append(_bar(step, span, shown.index(span.lane), zero, scale))
    phases = sorted({span.phase for span in spans}, key=lambda phase: (_color(phase), phase))
    legend = "".join(f'<span class="key"><i style="background:var(--s{_color(p)})"></i>{html.escape(p)}</span>' for p in phases)
    numbers = f"step {steps[0][0] + 1}" if len(steps) == 1 else f"steps {steps[0][0] + 1} to {steps[-1][0] + 1}"
    left_out = f"; {len(lanes) - len(shown)} more lanes are not shown" if len(lanes) > len(shown) else ""
    return (
        f'<figure class="card timeline"><figcaption><b>Timeline</b><small>{numbers}, seconds; of the engines the time in which '
        f'they had samples of these steps{left_out}</small></figcaption><div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="Timeline, {numbers}">{"".join(parts)}</svg></div><div class="legend">{legend}</div></figure>'
    )


def _axis(seconds: float, scale: float, height: int) -> str:
    parts = []
    for tick in nice_ticks(0.0, seconds, 8):
        if tick <= seconds:
            x = LEFT + tick * scale
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - AXIS}"/>')
            parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{format_number(round(tick, 9))}</text>')
    return "".join(parts)


def _bar(step: int, span: Span, place: int, zero: float, scale: float) -> str:
    width = max((span.end - span.begin) * scale, 0.6)
    said = f"{span.lane}, step {step + 1}: {span.phase}, {format_number(span.end - span.begin)} s"
    return (
        f'<rect x="{LEFT + (span.begin - zero) * scale:.1f}" y="{place * LANE + 3}" width="{width:.1f}" height="{LANE - 6}" '
        f'fill="var(--s{_color(span.phase)})"><title>{html.escape(said)}</title></rect>'
    )


def _color(phase: str) -> int:
    return COLORS.get(phase, OTHER)


def _lane_order(lane: str) -> tuple[int, str, int]:
    """The driver, then ranks, then engines, each by its number."""
    name, _, number = lane.rpartition(" ")
    kind = next((place for place, first in enumerate(("driver", "trainer", "engine")) if lane.split()[:1] == [first]), 3)
    return (kind, name, int(number)) if number.isdecimal() and len(number) < 10 else (kind, lane, 0)
