"""Small drawings as inline SVG: intervals in a table's cell, strips of pools, labelled scatters.

Only shapes and text: they scale with the page and print as they look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {
    "reference": "#5f6670", "expert": "#8d939c", "none": "#0072b2", "unlabelled": "#00795a",
    "labelled": "#b84a00", "task id": "#a8467d", "routed": "#17191d",
    "transductive": "#7a5c00",
}  # fmt: skip
"""Of requirement classes: Okabe and Ito's, told apart by people who are colour-blind, darkened
until text in them can be read on white."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """A range of values over a length, linear or logarithmic."""

    low: float
    high: float
    length: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, x = ((math.log10(v) if self.log else v) for v in (self.low, self.high, value))
        return (x - a) / (b - a) * self.length

    def ticks(self) -> list[float]:
        """Round values, about five."""
        if self.log:
            low, high = (math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            steps = (1.0,) if high - low > 3 else (1.0, 2.0, 5.0)
            all_of_them = [s * 10.0**e for e in range(low, high + 1) for s in steps]
            return [v for v in all_of_them if self.low <= v <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [first * step + i * step for i in range(int((self.high - first * step) / step) + 1)]


def axis(values: Iterable[float], length: float, log: bool = False) -> Axis:
    """An axis that holds all values with a little room."""
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = min(found), max(found)
    if log:
        room = max((high / low) ** 0.08, 1.3)
        return Axis(low / room, high * room, length, True)
    room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(low - room, high + room, length)


def interval_mark(
    value: float, low: float, high: float, scale: Axis, colour: str, line: float | None = None
) -> str:
    """A dot with its interval on a line of ``scale.length`` by 18 px; ``line`` marks a value."""
    a, b, x = (scale(v) for v in (low, high, value))
    rule = "" if line is None else _line(scale(line), 0, scale(line), 18, "#b8bfc9", "2 2")
    return (
        f'<svg class="mark" viewBox="0 0 {scale.length:g} 18" width="{scale.length:g}" height="18" '
        f'aria-hidden="true">{rule}{_line(a, 9, b, 9, colour, width=2)}'
        f'<circle cx="{x:.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def strip(values: Sequence[float], scale: Axis, colour: str) -> str:
    """One open dot for each pool."""
    dots = "".join(f'<circle cx="{scale(v):.1f}" cy="9" r="4" fill="#fff" fill-opacity=".6" '
                   f'stroke="{colour}" stroke-width="1.6"/>' for v in values)  # fmt: skip
    rail = _line(0, 9, scale.length, 9, "#e2e6ec")
    return (f'<svg class="mark" viewBox="0 0 {scale.length:g} 18" width="{scale.length:g}" '
            f'height="18" aria-hidden="true">{rail}{dots}</svg>')  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter; ``spread`` is its interval along y."""

    name: str
    x: float
    y: float
    colour: str
    spread: tuple[float, float] | None = None


def scatter(points: Sequence[Point], x_title: str, y_title: str, log: bool = False) -> str:
    """Points with labels that do not overlap: a label without room is left to its tool tip."""
    width, height, left, bottom = 760.0, 420.0, 62.0, 48.0
    across = axis([p.x for p in points], width - left - 20, log)
    ys = [v for p in points for v in (p.y, *(p.spread or ()))]
    up = axis(ys, height - bottom - 14)
    places = {p.name: (left + across(p.x), 14 + up.length - up(p.y)) for p in points}
    parts = [_grid(across, up, left, x_title, y_title, width, height)]
    for p in points:
        px, py = places[p.name]
        if p.spread:
            low, high = (14 + up.length - up(v) for v in p.spread)
            parts.append(_line(px, low, px, high, p.colour, width=1.2, opacity=0.55))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{p.colour}">'
                     f"<title>{escape(p.name)}: {p.x:.3g}, {p.y:.2f}</title></circle>")  # fmt: skip
    parts += _labels(points, places, (left, 4, width - 4, height - bottom))
    title = f"{escape(y_title)} against {escape(x_title)}"
    return (f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" '
            f'aria-label="{title}">{"".join(parts)}</svg>')  # fmt: skip


def _grid(
    across: Axis, up: Axis, left: float, x_title: str, y_title: str, width: float, height: float
) -> str:
    base = 14 + up.length
    parts = []
    for value in up.ticks():
        y = base - up(value)
        parts.append(_line(left, y, left + across.length, y, "#e6eaf0"))
        parts.append(_text(left - 8, y + 4, f"{value:g}", "end"))
    for value in across.ticks():
        x = left + across(value)
        parts.append(_line(x, base, x, base + 5, "#8d939c"))
        parts.append(_text(x, base + 19, f"{value:g}", "middle"))
    parts.append(_line(left, base, left + across.length, base, "#8d939c"))
    parts.append(_text(left + across.length / 2, height - 6, x_title, "middle"))
    middle = 14 + up.length / 2
    parts.append(f'<text x="15" y="{middle:.1f}" text-anchor="middle" '
                 f'transform="rotate(-90 15 {middle:.1f})">{escape(y_title)}</text>')  # fmt: skip
    return "".join(parts)


def _labels(
    points: Sequence[Point], places: Mapping[str, tuple[float, float]], room: Box
) -> list[str]:
    """Labels beside their points where they overlap neither points nor each other."""
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in places.values()]
    found = []
    for p in sorted(points, key=lambda point: -point.y):
        x, y = places[p.name]
        wide = 7.0 * len(p.name)
        for dx, dy, anchor in ((9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"),
                               (0, 19, "middle"), (8, -9, "start"), (-8, -9, "end"),
                               (8, 17, "start"), (-8, 17, "end")):  # fmt: skip
            start = x + dx - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            box = (start, y + dy - 11, start + wide, y + dy + 3)
            inside = room[0] <= box[0] and box[2] <= room[2] and room[1] <= box[1] <= room[3] - 14
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                found.append(_text(x + dx, y + dy, p.name, anchor, p.colour))
                break
    return found


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "", width: float = 1,
    opacity: float = 1,
) -> str:  # fmt: skip
    more = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width:g}" stroke-opacity="{opacity:g}"{more}/>')  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#4a515c") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
            f"{escape(text)}</text>")  # fmt: skip


def shade(value: float, low: float, high: float) -> str:
    """A cell's background as CSS, from near white to a blue on which dark text is still read."""
    part = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
    light, dark = (250, 251, 253), (124, 180, 224)
    mixed = ",".join(str(round(a + (b - a) * part)) for a, b in zip(light, dark, strict=True))
    return f"background:rgb({mixed})"
