"""Figures as SVG, written by hand: the panels of the report page, and the same panels as files.

Values by iterate with error bars, curves by step, and distributions by iterate share one kind of panel. An axis never
zooms in so far that noise looks like a trend: see `span`. Colours are near those of Okabe and Ito, which colour-blind
readers can tell apart; markers and dashes differ, too. The page recolours the classes s0 ... s6 for a dark screen.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#3a86c8", "#444444")
GREY = len(COLOURS) - 1
DASHES = ("", "6 3", "2 3", "8 3 2 3")
FONT = 'font-family="sans-serif" fill="#333"'
WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 290, 44, 166  # of the axes
NOISE = 12.0  # paired standard errors that an axis spans at least
BINS = 120  # of a curve, over the whole axis


@dataclass
class Mark:
    """A value at x: with the ends of its bar or band, and of the box around it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    box: tuple[float, float] | None = None
    note: str = ""


@dataclass
class Series:
    name: str
    marks: list[Mark] = field(default_factory=list)
    colour: int = 0
    line: bool = False  # a line without points, in any kind of panel


@dataclass
class Panel:
    """One figure. `format` is that of its values; `better` is 1 if larger is better, -1 if smaller is, else 0."""

    name: str
    series: list[Series]
    format: str = ".3g"
    better: int = 0
    note: str = ""  # below the title
    kind: str = "points"  # points, places (on an axis that does not count), curve or boxes
    least: float = 0.0  # that the axis spans
    x: tuple[float, float] = (0, 1)  # ends of the axis
    lines: Sequence[tuple[float, str]] = ()  # verticals with a label, where iterations begin

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name) + ".svg"


def bins(values: Sequence[tuple[float, float]], width: float) -> list[Mark]:
    """Means, with the smallest and the largest value, over stretches of an axis: of (x, y) in the order of x."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for x, y in values:
        groups.setdefault(int(x / max(width, 1)), []).append((x, y))
    marks = []
    for group in groups.values():
        ys = [y for _, y in group]
        marks.append(Mark(statistics.fmean(x for x, _ in group), statistics.fmean(ys), min(ys), max(ys)))
    return marks


def box(x: float, values: Sequence[float], fmt: str) -> Mark | None:
    """Median, quartiles, and the range without the outer twentieths."""
    values = sorted(values)
    if not values:
        return None
    low, first, middle, third, high = (values[round(q * (len(values) - 1))] for q in (0.05, 0.25, 0.5, 0.75, 0.95))
    note = f"median {middle:{fmt}}, half of all {first:{fmt}} to {third:{fmt}}, 90% {low:{fmt}} to {high:{fmt}}"
    return Mark(x, middle, low, high, (first, third), note)


def span(panel: Panel) -> tuple[float, float]:
    """Ends of the y axis: all marks with their bars, but at least `panel.least` and a tenth of the largest value."""
    marks = [mark for series in panel.series for mark in series.marks]
    ends = [y for mark in marks for y in (mark.y, mark.low, mark.high) if y is not None]
    low, high = min(ends), max(ends)
    largest = max(abs(low), abs(high))
    wanted = max(
        panel.least, 0.0 if panel.least else 0.1 * largest, 0.02 if "%" in panel.format else 1e-9 + 0.02 * largest
    )
    room = max(wanted - (high - low), 0.08 * (high - low)) / 2
    shift = max(0.0, room - low) if low >= 0 else 0.0  # no axis below 0 for what cannot be
    return low - room + shift, high + room + shift


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers on an axis."""
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.75)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(panel: Panel, standalone: bool = False) -> str:
    """A panel as an SVG element; `standalone` as a file of its own."""
    x0, x1 = panel.x
    y0, y1 = span(panel)
    pad = 2 if panel.kind == "curve" else 18

    def px(x: float) -> float:
        return LEFT + pad + (RIGHT - LEFT - 2 * pad) * (x - x0) / ((x1 - x0) or 1)

    def py(y: float) -> float:
        return TOP + (BOTTOM - TOP) * (y1 - min(max(y, y0), y1)) / (y1 - y0)

    direction = {1: "\u2191 better", -1: "\u2193 better"}.get(panel.better, "")
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{panel.name}. {panel.note}")}"'
    parts = [
        f'<svg class="panel" xmlns="http://www.w3.org/2000/svg" {size} {FONT} font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>' if standalone else "",
        f'<text x="6" y="14" font-size="13" font-weight="bold">{escape(panel.name)}</text>',
        f'<text x="{RIGHT}" y="14" text-anchor="end" class="dim">{direction}</text>',
        f'<text x="6" y="30" class="dim">{escape(panel.note)}</text>',
    ]
    levels = ticks(y0, y1)
    step = levels[1] - levels[0] if len(levels) > 1 else y1 - y0
    for y in levels:
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{py(y) + 4:.1f}" text-anchor="end">{label(y, step, panel.format)}</text>'
        )
    for x, text in panel.lines:
        parts.append(f'<path class="grid" d="M{px(x):.1f} {TOP}V{BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{px(x) + 3:.1f}" y="{TOP - 3}" class="dim" font-size="9">{escape(text)}</text>')
    shown = ticks(x0, x1, 6) if x1 > x0 else [x0]
    if panel.kind != "places":
        shown = [x for x in shown if x == int(x)]
    parts += [f'<text x="{px(x):.1f}" y="182" text-anchor="middle">{x:,.6g}</text>' for x in shown]
    for n, series in enumerate(panel.series):
        if series.marks:
            drawn = _curve if panel.kind == "curve" or series.line else _boxes if panel.kind == "boxes" else _points
            colour = COLOURS[series.colour % len(COLOURS)]
            shift = (n - (len(panel.series) - 1) / 2) * min(10, 60 / len(panel.series))
            shift = 0.0 if panel.kind == "places" else shift
            parts.append(f'<g class="s{series.colour % len(COLOURS)}" fill="{colour}" stroke="{colour}">')
            parts += [drawn(series, px, py, shift), "</g>"]
    return "".join(parts) + "</svg>"


def label(y: float, step: float, fmt: str) -> str:
    """A tick's value with the digits that the distance between ticks asks for."""
    scale, unit = (100, "%") if "%" in fmt else (1, "")
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    y = 0.0 if abs(y) < step / 1e3 else y
    return f"{y * scale:,.{min(digits, 6)}f}{unit}" if abs(y * scale) < 1e6 and digits <= 6 else f"{y:.1e}"


def _dash(series: Series) -> str:
    dash = DASHES[series.colour % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _points(series: Series, px, py, shift: float) -> str:
    """Markers with error bars, joined by a line."""
    shift = shift / 3  # bars of several runs beside each other
    at = [(px(m.x) + shift, py(m.y), m) for m in series.marks]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in at)
    parts = [f'<path d="M{path}" fill="none" stroke-width="1.5"{_dash(series)}/>']
    for x, y, mark in at:
        if mark.low is not None and mark.high is not None and mark.high > mark.low:
            low, high = py(mark.low), py(mark.high)
            ends = f"M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
            parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}{ends}" fill="none" stroke-width="1.5"/>')
        parts.append(
            f'<path d="M{x:.1f} {y:.1f}{MARKERS[series.colour % len(MARKERS)]}" stroke="none">{_title(mark)}</path>'
        )
    return "".join(parts)


MARKERS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
)


def _curve(series: Series, px, py, shift: float) -> str:
    """A line through means, and a band from the smallest to the largest value."""
    at = [(px(m.x), m) for m in series.marks]
    band = [(x, m) for x, m in at if m.low is not None and m.high is not None and m.high > m.low]
    path = "L".join(f"{x:.1f} {py(m.y):.1f}" for x, m in at)
    line = f'<path d="M{path}" fill="none" stroke-width="1.3"{_dash(series)}/>'
    if not band:
        return line
    ends = [f"{x:.1f} {py(m.high):.1f}" for x, m in band] + [f"{x:.1f} {py(m.low):.1f}" for x, m in reversed(band)]
    return f'<path d="M{"L".join(ends)}z" stroke="none" opacity="0.22"/>{line}'


def _boxes(series: Series, px, py, shift: float) -> str:
    """Median, box of the middle half, whiskers over 90%."""
    parts = []
    for mark in series.marks:
        x, (first, third) = px(mark.x) + shift, mark.box or (mark.y, mark.y)
        top = py(third)
        parts.append(f'<path d="M{x:.1f} {py(mark.low):.1f}V{py(mark.high):.1f}" opacity="0.6"/>')
        parts.append(
            f'<rect x="{x - 4:.1f}" y="{top:.1f}" width="8" height="{max(py(first) - top, 1):.1f}" fill-opacity="0.25">'
        )
        parts.append(f'{_title(mark)}</rect><path d="M{x - 4:.1f} {py(mark.y):.1f}h8" stroke-width="2.5"/>')
    return "".join(parts)


def _title(mark: Mark) -> str:
    return f"<title>{escape(mark.note)}</title>" if mark.note else ""


def sheet(title: str, panels: Iterable[Panel], names: Sequence[str] = (), columns: int = 4) -> str:
    """All panels in one SVG file, with a legend where there are several series of the given names."""
    panels = list(panels)
    lines = -(-len(panels) // columns)
    width = columns * WIDTH
    placed, entries = [], []
    for i, panel in enumerate(panels):
        place = f'x="{i % columns * WIDTH}" y="{50 + i // columns * HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        placed.append(svg(panel).replace("<svg ", f"<svg {place} ", 1))
    for n, name in enumerate(names):
        x, colour = 10 + n * width // len(names), COLOURS[n % len(COLOURS)]
        entries.append(f'<text x="{x}" y="42" fill="{colour}">\u25a0 {escape(name)}</text>')
    size = f'width="{width}" height="{56 + lines * HEIGHT}" viewBox="0 0 {width} {56 + lines * HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT} font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="24" font-size="16">{escape(title)}</text>'
        f"{''.join(entries + placed)}</svg>\n"
    )
