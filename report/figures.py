"""Figures as SVG, written by hand: the panels of the report page, of metrics.svg and of model cards.

Two kinds of series share one kind of panel: points with bars, and curves with bands. An axis never zooms in so far that
noise looks like a trend: see `span`. The colours resemble those of Okabe and Ito, which colour-blind readers can tell
apart; markers and dashes differ, too. The page recolours the classes s0 ... s6 for a dark screen.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#3a86c8", "#444444")
GREY = len(COLOURS) - 1
DASHES = ("none", "6 3", "2 3", "8 3 2 3")
MARKERS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
)
FONT = 'font-family="sans-serif" fill="#333"'
WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 290, 44, 166  # the ends of the axes
BINS = 120  # the most points of a curve
COLUMNS = 4  # panels beside each other in a file with all of them


@dataclass
class Mark:
    """A value at x, with the ends of its bar or band and of the thick part of the bar."""

    x: float
    y: float
    bar: tuple[float, ...] = ()
    thick: tuple[float, ...] = ()
    note: str = ""


@dataclass
class Series:
    marks: list[Mark]
    colour: int = 0
    curve: bool = False


@dataclass
class Panel:
    """One figure. `better` is 1 if larger values are better, -1 if smaller ones are, 0 if neither are."""

    name: str
    series: list[Series]
    format: str  # of the values
    better: int = 0
    note: str = ""  # below the title
    least: float = 0.0  # the y axis spans at least this
    x: tuple[float, float] = (0, 1)  # ends of the axis
    whole: bool = True  # the x axis counts, so its ticks are whole numbers
    lines: Sequence[tuple[float, str]] = ()  # vertical lines with labels


def bins(values: Sequence[tuple[float, float]], width: float) -> list[Mark]:
    """Means over stretches of an axis, with a band from the smallest to the largest value. (x, y) must be sorted."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for x, y in values:
        groups.setdefault(int(x / max(width, 1)), []).append((x, y))
    columns = [list(zip(*group)) for group in groups.values()]
    return [Mark(statistics.fmean(xs), statistics.fmean(ys), (min(ys), max(ys))) for xs, ys in columns]


def quantiles(x: float, values: Sequence[float]) -> Mark:
    """The median with a bar over 90% of the values, which is thick over half of them."""
    values = sorted(values)
    low, first, middle, third, high = (values[round(q * (len(values) - 1))] for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    note = f"median {middle:.2f}, half of all {first:.2f} to {third:.2f}, 90% {low:.2f} to {high:.2f}"
    return Mark(x, middle, (low, high), (first, third), note)


def span(panel: Panel) -> tuple[float, float]:
    """Ends of the y axis: all marks with their bars, but at least `panel.least`, or a tenth of the largest value."""
    ends = [y for series in panel.series for mark in series.marks for y in (mark.y, *mark.bar)]
    low, high = min(ends), max(ends)
    largest = max(abs(low), abs(high))
    wanted = max(panel.least or 0.1 * largest, 0.02 if "%" in panel.format else 1e-9 + 0.02 * largest)
    room = max(wanted - (high - low), 0.08 * (high - low)) / 2
    shift = max(0.0, room - low) if low >= 0 else 0.0  # Values that cannot be negative get no axis below 0.
    return low - room + shift, high + room + shift


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers on an axis."""
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.75)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(panel: Panel) -> str:
    """A panel as an SVG element, which is also a file of its own."""
    (x0, x1), (y0, y1) = panel.x, span(panel)
    pad = 2 if all(series.curve for series in panel.series) else 18

    def px(x: float) -> float:
        return LEFT + pad + (RIGHT - LEFT - 2 * pad) * (x - x0) / ((x1 - x0) or 1)

    def py(y: float) -> float:
        return TOP + (BOTTOM - TOP) * (y1 - y) / (y1 - y0)

    direction = {1: "\u2191 better", -1: "\u2193 better"}.get(panel.better, "")
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{panel.name}. {panel.note}")}"'
    parts = [
        f'<svg class="panel" xmlns="http://www.w3.org/2000/svg" {size} {FONT} font-size="11">',
        f'<text x="6" y="14" font-size="13" font-weight="bold">{escape(panel.name)}</text>',
        f'<text x="{RIGHT}" y="14" text-anchor="end" class="dim">{direction}</text>',
        f'<text x="6" y="30" class="dim">{escape(panel.note)}</text>',
    ]
    for y in ticks(y0, y1):
        text = f"{100 * y:,.6g}%" if "%" in panel.format else f"{y:,.6g}"
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{py(y) + 4:.1f}" text-anchor="end">{text}</text>')
    for x, text in panel.lines:
        parts.append(f'<path class="grid" d="M{px(x):.1f} {TOP}V{BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{px(x) + 3:.1f}" y="{TOP - 3}" class="dim" font-size="9">{escape(text)}</text>')
    for x in ticks(x0, x1, 6) if x1 > x0 else [x0]:
        if x == int(x) or not panel.whole:
            parts.append(f'<text x="{px(x):.1f}" y="182" text-anchor="middle">{x:,.6g}</text>')
    for n, series in enumerate(panel.series):
        points = panel.whole and not series.curve  # Those of several runs are drawn beside each other.
        beside = (n - (len(panel.series) - 1) / 2) * 6 if points else 0.0
        parts.append(drawn(series, lambda x, beside=beside: px(x) + beside, py))
    return "".join(parts) + "</svg>"


def drawn(series: Series, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    """A line through the values, with a band between the ends of their bars, or with the bars and markers."""
    marks, number = series.marks, series.colour % len(COLOURS)
    dash = DASHES[series.colour % len(DASHES)]
    line = "L".join(f"{px(mark.x):.1f} {py(mark.y):.1f}" for mark in marks)
    parts = [f'<path d="M{line}" fill="none" stroke-width="1.5" stroke-dasharray="{dash}"/>']
    if series.curve:
        ends = [(mark.x, mark.bar[1]) for mark in marks if mark.bar]
        ends += [(mark.x, mark.bar[0]) for mark in reversed(marks) if mark.bar]
        around = "L".join(f"{px(x):.1f} {py(y):.1f}" for x, y in ends)
        parts += [f'<path d="M{around}z" stroke="none" opacity="0.22"/>'] if ends else []
    for mark in [] if series.curve else marks:
        x = px(mark.x)
        if mark.bar:
            low, high = map(py, mark.bar)
            ends = "" if mark.thick else f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}{ends}" fill="none" stroke-width="1.5"/>')
        if mark.thick:
            low, high = map(py, mark.thick)
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke-width="6" opacity="0.4"/>')
        shape, title = MARKERS[series.colour % len(MARKERS)], f"<title>{escape(mark.note)}</title>"
        parts.append(f'<path d="M{x:.1f} {py(mark.y):.1f}{shape}" stroke="none">{title}</path>')
    return f'<g class="s{number}" fill="{COLOURS[number]}" stroke="{COLOURS[number]}">{"".join(parts)}</g>'


def sheet(title: str, panels: Iterable[Panel]) -> str:
    """All panels in one SVG file."""
    placed = []
    for i, panel in enumerate(panels):
        left, top = i % COLUMNS * WIDTH, 40 + i // COLUMNS * HEIGHT
        place = f'x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}"'
        placed.append(svg(panel).replace("<svg ", f"<svg {place} ", 1))
    width, height = COLUMNS * WIDTH, 46 - (-len(placed) // COLUMNS) * HEIGHT
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT} font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="24" font-size="16">{escape(title)}</text>'
        f"{''.join(placed)}</svg>\n"
    )
