"""Inline SVG charts for the report: lines, stacked areas and diverging stacked bars. No dependency, no network.

A chart is drawn here, completely; the page's script only adds the crosshair and the tooltip, from the numbers in
`data-chart`. Colours are CSS variables (`--s0` ... `--s7`), so one drawing serves the light and the dark scheme.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 10, 26
NUM_COLORS = 8
DOT_BELOW = 3  # a line of fewer points is drawn as dots, or nobody would see it
SMOOTH_FROM = 12  # points from which a running mean is drawn over a pale line
MAX_POINTS = 600  # a longer curve is drawn from the means of equal parts


@dataclass(frozen=True)
class Series:
    """One curve. `points`: (step, value), ascending; values that are not finite leave a gap. `color`: index of --sN. `band`:
    (step, low, high) of what is shaded around it, finite."""

    label: str
    points: list[tuple[float, float]]
    color: int
    band: list[tuple[float, float, float]] = field(default_factory=list)


def format_number(value: float, digits: int = 4) -> str:
    """So many significant digits, in the shortest readable form."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e4 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        text = f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+")
        return text.replace(".00e", "e")
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.{digits}g}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values that enclose [low, high]; the first and the last are the axis' ends."""
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(values: list[float]) -> tuple[float, float]:
    """The range to show: it starts at 0 unless that would squeeze the curve into a corner."""
    low, high = min(values), max(values)
    if low == high:  # a flat line: show how far from 0 it is
        return (min(low, 0.0), max(high, 0.0)) if low != 0 else (0.0, 1.0)
    if 0 < low < 0.6 * high:
        low = 0.0
    return low, high


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / limit)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred running mean over about a tenth of the curve."""
    half = max(1, len(points) // 20)
    result = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        result.append((x, sum(window) / len(window) if window else math.nan))
    return result


class _Axes:
    """Data coordinates to pixels, and the drawn axes."""

    def __init__(self, xs: list[float], values: list[float]) -> None:
        self.x_low, self.x_high = min(xs), max(xs)
        if self.x_high == self.x_low:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        self.steps = (min(xs), max(xs))
        self.ticks = nice_ticks(*value_range(values))
        self.y_low, self.y_high = self.ticks[0], self.ticks[-1]

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (self.y_high - value) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def draw(self) -> str:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            kind = "zero" if tick == 0 else "grid"
            parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{format_number(round(tick, 12))}</text>')
        for tick in nice_ticks(self.x_low, self.x_high, 5):
            if self.steps[0] <= tick <= self.steps[1] and float(tick).is_integer():
                parts.append(f'<text x="{self.x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(tick)}</text>')
        return "".join(parts)


def _path(axes: _Axes, points: list[tuple[float, float]]) -> str:
    commands, pen_down = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{axes.x(x):.1f} {axes.y(y):.1f}")
        pen_down = math.isfinite(y)
    return "".join(commands)


def _frame(title: str, hint: str, axes: _Axes | None, body: str, series: list[Series]) -> str:
    """The card around a drawing: title, legend, svg with the tooltip's numbers."""
    legend = "".join(
        f'<span class="key"><i style="background:var(--s{s.color})"></i>{html.escape(s.label)}</span>' for s in series
    )
    head = f"<figcaption><b>{html.escape(title)}</b><small>{html.escape(hint)}</small></figcaption>"
    if axes is None:
        return f'<figure class="card">{head}<p class="empty">no values</p></figure>'
    rows = [
        {"label": s.label, "color": s.color, "points": [[round(x, 2), None if not math.isfinite(y) else y] for x, y in s.points]}
        for s in series
    ]
    data = {"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "low": axes.x_low, "high": axes.x_high, "series": rows}
    cross = f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>'
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{html.escape(title)}" '
        f'data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}">{axes.draw()}{body}{cross}</svg>'
    )
    return f'<figure class="card">{head}{svg}<div class="legend">{legend}</div></figure>'


def _thin_band(band: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    lows, highs = thin([(x, low) for x, low, _ in band]), thin([(x, high) for x, _, high in band])
    return [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)]


def _finite(series: list[Series]) -> tuple[list[Series], list[float], list[float]]:
    series = [Series(s.label, thin(s.points), s.color, _thin_band(s.band)) for s in series if s.points]
    xs = [x for s in series for x, _ in s.points]
    values = [y for s in series for _, y in s.points if math.isfinite(y)]
    values += [y for s in series for _, *bounds in s.band for y in bounds]
    return series, xs, values


def line_chart(title: str, series: list[Series], *, hint: str = "", smoothed: bool = False) -> str:
    """Curves over steps as a card of HTML. `smoothed` draws the running mean over the pale curve itself."""
    series, xs, values = _finite(series)
    if not values:
        return _frame(title, hint, None, "", series)
    axes = _Axes(xs, values)
    body = []
    for s in series:
        color = f"var(--s{s.color})"
        if s.band:
            edge = [(x, high) for x, _, high in s.band] + [(x, low) for x, low, _ in reversed(s.band)]
            body.append(f'<path class="band" d="{_path(axes, edge)}Z" fill="{color}"/>')
        if sum(math.isfinite(y) for _, y in s.points) < DOT_BELOW:
            body += [f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.5" fill="{color}"/>' for x, y in s.points]
        elif smoothed and len(s.points) >= SMOOTH_FROM:
            pale = "pale" if len(series) == 1 else "pale many"
            body.append(f'<path class="{pale}" d="{_path(axes, s.points)}" stroke="{color}"/>')
            body.append(f'<path class="line" d="{_path(axes, smooth(s.points))}" stroke="{color}"/>')
        else:
            body.append(f'<path class="line" d="{_path(axes, s.points)}" stroke="{color}"/>')
    return _frame(title, hint, axes, "".join(body), series)


def stacked_bars(title: str, series: list[Series], *, hint: str = "") -> str:
    """One bar per step: positive parts stacked upwards from 0, negative ones downwards. All series need the same steps."""
    series, xs, _ = _finite(series)
    if not xs:
        return _frame(title, hint, None, "", series)
    columns: dict[float, list[tuple[int, float]]] = {}
    for s in series:
        for x, y in s.points:
            if math.isfinite(y):
                columns.setdefault(x, []).append((s.color, y))
    totals = [sum(max(y, 0) for _, y in column) for column in columns.values()]
    depths = [sum(min(y, 0) for _, y in column) for column in columns.values()]
    steps = sorted(columns)
    gap = min((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1.0)
    axes = _Axes([steps[0] - gap / 2, steps[-1] + gap / 2], [*totals, *depths, 0.0])
    axes.steps = (steps[0], steps[-1])
    width = max(1.0, (axes.x(gap) - axes.x(0)) * (0.8 if len(steps) < 80 else 1.0))
    width = min(width, 36.0)
    body = []
    for x, column in columns.items():
        up = down = 0.0
        for color, y in column:
            start = up if y >= 0 else down
            top, bottom = axes.y(max(start, start + y)), axes.y(min(start, start + y))
            left = axes.x(x) - width / 2
            place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{max(bottom - top, 0.3):.1f}"'
            body.append(f'<rect {place} fill="var(--s{color})"/>')
            up, down = (start + y, down) if y >= 0 else (up, start + y)
    return _frame(title, hint, axes, "".join(body), series)
