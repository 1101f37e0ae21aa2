"""Small line charts as SVG text, a few panels side by side; enough for the documents, without a plotting library.

Notable choices
- A panel has one measure and one scale: what is compared across measures stands in panels of its own.
- The picture brings its own background, so that it reads on a dark page as on a light one; text is text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 440
HEIGHT: Final = 290
"""Of one panel, in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 80, 46
_GAP: Final = 8
_INK, _SOFT, _GRID, _PAPER = "#1f2328", "#656d76", "#e4e7eb", "#ffffff"
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Series:
    """One line, named in the panel's legend; points that are not finite are left out."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One chart: a logarithmic x axis with the given ticks, a y axis from 0 to `top` (see `round_up`)."""

    title: str
    subtitle: str
    x_label: str
    x_ticks: Sequence[float]
    top: float
    series: Sequence[Series]
    y_format: Callable[[float], str]
    mark_x: tuple[float, str] | None = None
    """A vertical line, and what it says."""
    mark_y: float | None = None
    """A dashed horizontal line."""


_STEPS: Final = {1: 4, 1.5: 3, 2: 4, 3: 3, 4: 4, 5: 5, 6: 3, 8: 4, 10: 5}
"""Ends of an axis between two powers of ten, and into how many parts each is best cut."""


def round_up(value: float) -> float:
    """The next good end of an axis; 1 for what is no positive number."""
    if not 0 < value < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return power * next(step for step in _STEPS if step * power >= value * (1 - 1e-9))


def _parts(top: float) -> int:
    leading = top / 10.0 ** math.floor(math.log10(top) + 1e-9)
    return next((parts for step, parts in _STEPS.items() if math.isclose(step, leading)), 4)


def figure(panels: Sequence[Panel], columns: int, description: str) -> str:
    """The panels row by row as one SVG document; `description` is for those who cannot see it."""
    lines = -(-len(panels) // columns)
    wide, high = columns * (WIDTH + _GAP) + _GAP, lines * (HEIGHT + _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" '
        f'height="{high}" role="img" font-family="{_FONT}" font-size="12">',
        f"<title>{escape(description)}</title>",
        f'<rect width="{wide}" height="{high}" rx="8" fill="{_PAPER}"/>',
    ]
    for at, panel in enumerate(panels):
        left = _GAP + at % columns * (WIDTH + _GAP)
        top = _GAP + at // columns * (HEIGHT + _GAP)
        parts += [f'<g transform="translate({left} {top})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    low, high = math.log(panel.x_ticks[0]), math.log(panel.x_ticks[-1])

    def across(value: float) -> float:
        share = (math.log(max(value, 1e-9)) - low) / (high - low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return HEIGHT - _BOTTOM - value / panel.top * (HEIGHT - _TOP - _BOTTOM)

    base = up(0)
    parts = [
        _text(12, 22, panel.title, _INK, size=15, weight=600),
        _text(12, 41, panel.subtitle, _SOFT),
    ]
    cuts = _parts(panel.top)
    for k in range(cuts + 1):
        value = panel.top * k / cuts
        y = up(value)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, _GRID if k else _SOFT))
        parts.append(_text(_LEFT - 8, y + 4, panel.y_format(value), _SOFT, anchor="end"))
    for tick in panel.x_ticks:
        parts.append(_line(across(tick), base, across(tick), base + 4, _SOFT))
        parts.append(_text(across(tick), base + 18, f"{tick:g}", _SOFT, anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, panel.x_label, _SOFT, anchor="middle"))
    if panel.mark_y is not None:
        y = up(panel.mark_y)
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, _SOFT, dashes="4 4"))
    if panel.mark_x is not None:
        x, said = across(panel.mark_x[0]), panel.mark_x[1]
        parts.append(_line(x, _TOP - 4, x, base, _SOFT, dashes="4 4"))
        parts.append(_text(x + 6, _TOP + 6, said, _SOFT))
    for series in panel.series:
        parts += _series(series, across, up)
    return parts + _legend(panel.series)


def _series(
    series: Series, across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    points = [
        (across(x), up(y)) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(y)
    ]
    if not points:
        return []
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{series.colour}" stroke-width="2" '
        'stroke-linejoin="round" stroke-linecap="round"/>'
    ]
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.colour}" '
        f'stroke="{_PAPER}" stroke-width="1"/>'
        for x, y in points
    ]
    return parts


def _legend(series: Sequence[Series]) -> list[str]:
    """Names beside their colours, in one line."""
    parts, x = [], 12.0
    for one in series:
        if one.label:
            parts.append(f'<circle cx="{x + 4:.1f}" cy="58" r="4" fill="{one.colour}"/>')
            parts.append(_text(x + 13, 62, one.label, _INK))
            x += 13 + 6.4 * len(one.label) + 16
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    colour: str,
    anchor: str = "start",
    size: int = 12,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-size="{size}" font-weight="{weight}">{escape(text)}</text>'
    )
