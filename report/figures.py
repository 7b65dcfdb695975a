"""Figures as SVG, written by hand: the panels of the report page, of metrics.svg and of model cards.

A panel has points with bars by iterate, or curves with bands by step. An axis never zooms in so far that noise looks
like a trend: see `span`. The colours resemble those of Okabe and Ito, which colour-blind readers can tell apart;
markers and dashes differ, too. The page recolours the classes s0 ... s6 for a dark screen.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#3a86c8", "#444444")
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
COLUMNS = 4  # panels beside each other in a file with all of them


class Mark(NamedTuple):
    """A value at x, with the ends of its bar or band."""

    x: float
    y: float
    low: float
    high: float


@dataclass
class Panel:
    """One figure."""

    name: str
    series: list[list[Mark]]  # one list per run, whose index is its colour; may be empty
    format: str  # how its values are written
    better: int = 0  # 1 if larger values are better, -1 if smaller ones are, 0 if neither are
    note: str = ""  # text below the title
    least: float = 0.0  # The y axis spans at least this.
    curves: bool = False  # The marks are curves with bands, not points with bars.
    lines: Sequence[tuple[float, str]] = ()  # vertical lines with labels


def span(panel: Panel) -> tuple[float, float]:
    """Ends of the y axis: all marks with their bars, but at least `panel.least`, or a tenth of the largest value."""
    low = min(mark.low for marks in panel.series for mark in marks)
    high = max(mark.high for marks in panel.series for mark in marks)
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
    y0, y1 = span(panel)
    last = max([1, *(mark.x for marks in panel.series for mark in marks)])  # iterate or step
    pad = 2 if panel.curves else 18

    def px(x: float) -> float:
        return LEFT + pad + (RIGHT - LEFT - 2 * pad) * x / last

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
    for x in ticks(0, last, 6):
        if x == int(x):
            parts.append(f'<text x="{px(x):.1f}" y="182" text-anchor="middle">{x:,.6g}</text>')
    for run, marks in enumerate(panel.series):
        beside = 0.0 if panel.curves else 6 * (run - (len(panel.series) - 1) / 2)  # Points of runs stand side by side.
        if marks:
            parts.append(drawn([(px(x) + beside, *map(py, ys)) for x, *ys in marks], run, panel.curves))
    return "".join(parts) + "</svg>"


def drawn(places: Sequence[tuple[float, ...]], run: int, curve: bool) -> str:
    """The marks of one run, given as (x, y, low, high) on the paper, and a line through them."""
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in places)
    parts = [f'<path d="M{line}" fill="none" stroke-width="1.5" stroke-dasharray="{DASHES[run % len(DASHES)]}"/>']
    if curve:
        ends = [(x, high) for x, _, _, high in places] + [(x, low) for x, _, low, _ in reversed(places)]
        around = "L".join(f"{x:.1f} {y:.1f}" for x, y in ends)
        parts.append(f'<path d="M{around}z" stroke="none" opacity="0.22"/>')
    for x, y, low, high in [] if curve else places:
        if low > high:  # y grows downwards.
            bar = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6M{x - 3:.1f} {high:.1f}h6"
            parts.append(f'<path d="{bar}" fill="none" stroke-width="1.5"/>')
        parts.append(f'<path d="M{x:.1f} {y:.1f}{MARKERS[run % len(MARKERS)]}" stroke="none"/>')
    number = run % len(COLOURS)
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
