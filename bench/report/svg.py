"""SVG charts as text: stacked bars, and points over an axis. They know nothing of artifacts.

Written by hand rather than by a plotting library so that one file serves paper, phone, light and
dark: text stays text, colours are classes whose values the page's style sheet gives, and nothing is
narrower than a phone. Units of length are pixels of a drawing ``WIDTH`` wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
_TEXT = 12
_LETTER = 6.6
"""Width of a letter, on the safe side for the fonts of the page."""
_BAR = 16
_COLOURS = 6
_MARKERS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Bar:
    """One bar: parts from left to right, each (class of its colour, value), and what it says.

    ``low`` and ``high`` draw the spread of the whole bar.
    """

    label: str
    parts: Sequence[tuple[str, float]]
    value: str
    low: float | None = None
    high: float | None = None

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class BarGroup:
    """Bars under one heading."""

    heading: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Point:
    """A measured value with its spread."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one thing; ``number`` chooses colour and marker."""

    name: str
    number: int
    points: Sequence[Point]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """Title with its unit; whether it grows by factors, or shows only where points are."""

    title: str
    logarithmic: bool = False
    close_up: bool = False


def bar_chart(groups: Sequence[BarGroup], unit: str, description: str) -> str:
    """Horizontal bars over a common axis, headings above their bars."""
    bars = [bar for group in groups for bar in group.bars]
    top = max((max(bar.total, bar.high or 0) for bar in bars), default=1) or 1
    left = 8 + _LETTER * max((len(bar.label) for bar in bars), default=0)
    right = WIDTH - 10 - _LETTER * max((len(bar.value) for bar in bars), default=0)
    ticks = nice_ticks(top, 4)
    scale = (right - left) / max(top, 1e-12)
    body: list[str] = []
    y = 4.0
    for group in groups:
        y += 14
        body.append(_text(0, y, _fitting(group.heading), "heading"))
        y += 6
        for bar in group.bars:
            body += _bar(bar, left, y, scale)
            y += _BAR + 4
        y += 4
    grid = [
        f'<line class="grid" x1="{left + tick * scale:.1f}" x2="{left + tick * scale:.1f}" '
        f'y1="4" y2="{y:.1f}"/>'
        for tick in ticks
    ]
    body += [
        _text(left + tick * scale, y + _TEXT + 2, text, "tick", anchor="middle")
        for tick, text in zip(ticks, tick_texts(ticks), strict=True)
    ]
    body.append(_text((left + right) / 2, y + 2 * _TEXT + 6, unit, "tick", anchor="middle"))
    return _svg(y + 2 * _TEXT + 12, [*grid, *body], description)


def point_chart(series: Sequence[Series], x: Axis, y: Axis, description: str) -> str:
    """Points over two axes."""
    points = [point for each in series for point in each.points]
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    ticks_y = _ticks(heights, y, 4)
    texts_y = tick_texts(ticks_y)
    left = 12 + _LETTER * max(map(len, texts_y))
    right, floor, ceiling = WIDTH - 14.0, 216.0, 30.0
    place_x, ticks_x = _scale([p.x for p in points], x, left + 8, right - 8)
    place_y, _ = _scale(heights, y, floor, ceiling)
    body = [_text(0, 14, y.title, "tick")]
    for tick, text in zip(ticks_y, texts_y, strict=True):
        at = place_y(tick)
        body.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        body.append(_text(left - 6, at + 4, text, "tick", anchor="end"))
    for tick, text in zip(ticks_x, tick_texts(ticks_x), strict=True):
        body.append(_text(place_x(tick), floor + 18, text, "tick", anchor="middle"))
    body.append(_text((left + right) / 2, floor + 36, x.title, "tick", anchor="middle"))
    for each in series:
        body += _series(each, place_x, place_y)
    return _svg(floor + 42, body, description)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(class, text) of each colour, as HTML that wraps."""
    items = "".join(
        f'<li><svg width="12" height="12" aria-hidden="true"><rect class="{escape(name)}" '
        f'width="12" height="12" rx="2"/></svg> {escape(text)}</li>'
        for name, text in entries
    )
    return f'<ul class="legend">{items}</ul>'


def series_legend(series: Sequence[Series]) -> str:
    """Marker and name of each series, as HTML that wraps."""
    items = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true">{_marker(each.number, 7, 7)}</svg> '
        f"{escape(each.name)}</li>"
        for each in series
    )
    return f'<ul class="legend">{items}</ul>'


def nice_ticks(top: float, count: int) -> list[float]:
    """About ``count`` round values from 0, the last one not above ``top``."""
    rough = top / count
    unit = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(int(top / step + 1e-9) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Numbers at an axis, all with as many digits as tell each from the next."""
    near = abs(ticks[1] - ticks[0]) * 1e-3 if len(ticks) > 1 else 0.0
    for decimals in range(6):
        texts = [f"{tick:,.{decimals}f}" for tick in ticks]
        pairs = zip(texts, ticks, strict=True)
        if all(abs(float(text.replace(",", "")) - tick) <= near for text, tick in pairs):
            return texts
    for digits in range(2, 17):
        texts = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(texts)) == len(ticks):
            break
    return texts


def number(value: float) -> str:
    """Short, with a comma every three digits."""
    if value and abs(value) < 1:
        return f"{value:.2g}"
    rounded = round(value, 1)
    return f"{rounded:,.0f}" if rounded == int(rounded) else f"{rounded:,.1f}"


def _bar(bar: Bar, left: float, y: float, scale: float) -> list[str]:
    body = [_text(left - 6, y + _BAR - 4, bar.label, "tick", anchor="end")]
    x = left
    for name, size in bar.parts:
        width = size * scale
        body.append(
            f'<rect class="{escape(name)}" x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" '
            f'height="{_BAR}"/>'
        )
        x += width
    end = x
    if bar.low is not None and bar.high is not None:
        middle, low, high = y + _BAR / 2, left + bar.low * scale, left + bar.high * scale
        body.append(
            f'<path class="spread" d="M{low:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}'
            f'M{high:.1f} {middle - 4}v8"/>'
        )
        end = max(end, high)
    body.append(_text(end + 5, y + _BAR - 4, bar.value, "value"))
    return body


def _series(
    each: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]
) -> list[str]:
    body = []
    ordered = sorted(each.points, key=lambda point: point.x)
    if each.line and len(ordered) > 1:
        path = "L".join(f"{place_x(p.x):.1f} {place_y(p.y):.1f}" for p in ordered)
        body.append(f'<path class="line s{each.number % _COLOURS}" d="M{path}"/>')
    for point in ordered:
        x, y = place_x(point.x), place_y(point.y)
        if point.low is not None and point.high is not None:
            low, high = place_y(point.low), place_y(point.high)
            body.append(
                f'<path class="spread" d="M{x - 3:.1f} {low:.1f}h6M{x:.1f} {low:.1f}V{high:.1f}'
                f'M{x - 3:.1f} {high:.1f}h6"/>'
            )
        body.append(_marker(each.number, x, y))
    return body


def _marker(index: int, x: float, y: float) -> str:
    kind, name = _MARKERS[index % len(_MARKERS)], f"c{index % _COLOURS}"
    if kind == "circle":
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == "square":
        return f'<rect class="{name}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    shape = "M{0} {1}l5 5-5 5-5-5z" if kind == "diamond" else "M{0} {1}l5 9h-10z"
    return f'<path class="{name}" d="{shape.format(f"{x:.1f}", f"{y - 5:.1f}")}"/>'


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between two places, and the ticks."""
    ticks = _ticks(values, axis, 4)
    if axis.logarithmic:
        first, last = math.log2(ticks[0]), math.log2(max(ticks[-1], *values))
        return (
            lambda v: start + (end - start) * (math.log2(max(v, 1)) - first) / (last - first)
        ), ticks
    low, high = ticks[0], max(ticks[-1], max(values, default=0.0))
    return (lambda v: start + (end - start) * (v - low) / (high - low)), ticks


def _ticks(values: Sequence[float], axis: Axis, count: int) -> list[float]:
    """Round values from below the lowest, or from 0, to about the highest; at least two."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis.logarithmic:
        first, last = math.floor(math.log2(max(low, 1))), math.ceil(math.log2(max(high, 2)))
        last = max(last, first + 1)
        return [2.0**power for power in range(first, last + 1, 1 if last - first <= 6 else 2)]
    if not axis.close_up:
        return nice_ticks(high or 1.0, count)
    span = high - low
    if not span:
        # One height only: shown below its top, as a share of 100 % cannot be exceeded.
        span = max(abs(high) * 0.1, 1e-9)
        low = high - span / 2
    steps = nice_ticks(span, count)
    step = steps[1] if len(steps) > 1 else span
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * at for at in range(first, max(last, first + 1) + 1)]


def _fitting(text: str) -> str:
    """A heading without its middle where it is wider than the drawing; letters are bold."""
    most = int(WIDTH / (1.1 * _LETTER))
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - most // 2 - 1) :]}"


def _text(x: float, y: float, text: str, name: str, anchor: str = "start") -> str:
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(height: float, body: Sequence[str], description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(description)}">{"".join(body)}</svg>'
    )
