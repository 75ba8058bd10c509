"""Plots as SVG inside a page, whose style sheet gives the colours of the classes ``c0`` to ``c8``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460  # of every plot, in its own units: about the pixels of a phone, so that text stays readable there
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40  # margins around the axes
COLOURS = 9  # ours, and eight others


def colours(labels: Iterable[str]) -> Callable[[str], str]:
    """One class per label, the same wherever the label comes: ``c0`` for ours, the others in order."""
    others = list(dict.fromkeys(label for label in labels if label != "ours"))
    place = {label: 1 + i % (COLOURS - 1) for i, label in enumerate(others)} | {"ours": 0}
    return lambda label: f"c{place[label]}"


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from value ``low`` at ``start`` to ``high`` at ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, stop: float) -> Axis:
        """Around all values, with a little room."""
        values = list(values)
        room = 1.15
        return cls(min(values) / room, max(values) * room, start, stop)

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round numbers inside, at least two and not too many."""
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(ticks) >= 3:
                return ticks
        return ticks or [self.low, self.high]


def bars(
    groups: Sequence[tuple[str, Sequence[tuple[str, float]]]], values: Iterable[float], colour: Callable[[str], str]
) -> str:
    """Per group a heading and one bar per peer, from 1x to how many times faster ours is: to the left where it is not.

    Args:
        values: what the axis has room for: those of all plots that are to have one scale.
    """
    x = Axis.over([*values, 1.0], 8, WIDTH - 52)
    parts, y = [], 0.0
    for heading, peers in groups:
        parts.append(_text(8, y + 12, heading, "soft"))
        y += 18
        axis = f'x1="{x(1.0):.1f}" y1="{y - 2:.1f}" x2="{x(1.0):.1f}" y2="{y + 15 * len(peers):.1f}"'
        for label, value in peers:
            start, stop = sorted((x(1.0), x(value)))
            parts.append(
                f'<rect class="{colour(label)}" x="{start:.1f}" y="{y:.1f}" width="{max(stop - start, 1):.1f}" '
                f'height="12"><title>{escape(f"{heading}, {label}: {value:.2f}x")}</title></rect>'
            )
            parts.append(_text(stop + 4, y + 10, f"{value:.1f}x", "bad" if value < 1 else ""))
            y += 15
        parts.append(f'<line class="axis" {axis}/>')
        y += 4
    return _svg(y + 4, parts)


@dataclass(frozen=True)
class Line:
    """Times over a size: ``(x, p20, p50, p80)``."""

    label: str
    points: Sequence[tuple[float, float, float, float]]


def lines(series: Sequence[Line], x_title: str, y_title: str, colour: Callable[[str], str]) -> str:
    """Medians joined by lines, with a whisker from p20 to p80."""
    height = 250
    at = sorted({point[0] for line in series for point in line.points})
    x = Axis.over(at, LEFT, WIDTH - RIGHT)
    times = [time for line in series for point in line.points for time in point[1:]]
    y = Axis.over(times, height - BOTTOM, TOP)
    parts = _frame(x, y, height, x_title, y_title, x_ticks=at)
    for line in series:
        name = colour(line.label)
        path = " ".join(f"{x(value):.1f},{y(p50):.1f}" for value, _, p50, _ in line.points)
        parts.append(f'<polyline class="line {name}" points="{path}"/>')
        for value, p20, p50, p80 in line.points:
            place = f"{x(value):.1f}"
            parts.append(
                f'<line class="line {name}" x1="{place}" y1="{y(p20):.1f}" x2="{place}" y2="{y(p80):.1f}"/>'
            )
            parts.append(_dot(x(value), y(p50), name, f"{line.label}, {x_title} {value:g}: {p50:.3f} ms"))
    return _svg(height, parts)


@dataclass(frozen=True)
class Dot:
    label: str
    what: str
    intensity: float  # useful operations per byte that must move
    gflops: float


def roofline(dots: Sequence[Dot], peak_gflops: float, bandwidth: float, colour: Callable[[str], str]) -> str:
    """Achieved rates under the roof of the machine: memory to the left of the ridge, arithmetic to the right."""
    height = 270
    ridge = peak_gflops / bandwidth
    x = Axis.over([ridge / 4, ridge * 4, *(dot.intensity for dot in dots)], LEFT, WIDTH - RIGHT)
    y = Axis.over([peak_gflops * 1.5, *(dot.gflops for dot in dots)], height - BOTTOM, TOP)
    parts = _frame(x, y, height, "useful operations per byte", "GFLOP/s")
    # The slope enters at the left edge, or at the bottom where it is below every dot there.
    start = max(x.low, y.low / bandwidth)
    roof = ((start, start * bandwidth), (ridge, peak_gflops), (x.high, peak_gflops))
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
    parts.append(f'<polyline class="roof" points="{path}"/>')
    parts.append(_text(WIDTH - RIGHT, y(peak_gflops) - 5, f"{peak_gflops:.0f} GFLOP/s", "soft end"))
    middle = math.sqrt(start * ridge)
    parts.append(_text(x(middle) - 6, y(middle * bandwidth) - 6, f"{bandwidth:.0f} GB/s", "soft end"))
    for dot in sorted(dots, key=lambda dot: dot.label == "ours"):  # ours above the others
        what = f"{dot.label}, {dot.what}: {dot.gflops:.1f} GFLOP/s at {dot.intensity:.1f} operations per byte"
        parts.append(_dot(x(dot.intensity), y(dot.gflops), colour(dot.label), what))
    return _svg(height, parts)


def _frame(
    x: Axis, y: Axis, height: float, x_title: str, y_title: str, x_ticks: Sequence[float] | None = None
) -> list[str]:
    """Both axes, their ticks and titles."""
    bottom, parts = height - BOTTOM, []
    taken = -math.inf
    for value in x.ticks() if x_ticks is None else x_ticks:
        if x(value) - taken < 30:
            continue  # its number would lie on the one before
        taken = x(value)
        parts.append(f'<line class="grid" x1="{taken:.1f}" y1="{TOP}" x2="{taken:.1f}" y2="{bottom}"/>')
        parts.append(_text(taken, bottom + 15, f"{value:g}", "middle"))
    for value in y.ticks():
        place = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{place}" x2="{WIDTH - RIGHT}" y2="{place}"/>')
        parts.append(_text(LEFT - 5, y(value) + 4, f"{value:g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_title, "soft middle"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="soft middle" transform="translate(12 {middle:.1f}) rotate(-90)">{escape(y_title)}</text>'
    )
    return parts


def _dot(x: float, y: float, name: str, what: str) -> str:
    return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(what)}</title></circle>'


def _text(x: float, y: float, text: str, name: str = "") -> str:
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height:.0f}">\n{body}\n</svg>'
    )
