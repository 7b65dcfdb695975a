"""What both reports of evidence share: blocks of the documents, tables, and a figure."""

import re
from collections.abc import Callable, Iterable
from html import escape
from typing import Any, NamedTuple

from measuring import ROOT

from report.figures import FONT, ticks

DOCUMENTS = ("docs/evidence.md", "docs/family.md", "README.md")
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#56b4e9", "#444444", "#c0a000", "#7a4ad0")
Columns = dict[str, str | Callable[[Any], str]]  # title -> a function of a row, or a format string of its fields


def write_blocks(kind: str, block: Callable[[str], str]) -> None:
    for name in DOCUMENTS:
        (ROOT / name).write_text(with_blocks((ROOT / name).read_text(), kind, block))


def with_blocks(text: str, kind: str, block: Callable[[str], str]) -> str:
    """A document with block(NAME) between each of its markers `<!-- KIND: NAME -->` and `<!-- end -->`."""
    pattern = re.compile(rf"(<!-- {kind}: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + block(match[2]) + match[3], text)


def table(rows: Iterable[Any], columns: Columns) -> str:
    lines = [[*columns], ["---"] * len(columns)]
    lines += [[text(row) if callable(text) else text.format(**row) for text in columns.values()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Spot(NamedTuple):
    name: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    path: str = ""  # A line joins the spots of an entry that have the same one.


def scatter(title: str, across: str, upwards: str, spots: dict[str, list[Spot]], sure: float = 0.0) -> str:
    """All spots of a legend's entries, with a bar of one standard error on each side, as SVG.

    `sure`: both axes count standard errors; a square of this size is the noise, and beyond its corner both are won.
    """
    every = [spot for some in spots.values() for spot in some]

    def scale(values: list[float], first: float, last: float) -> tuple[Callable[[float], float], list[float]]:
        """A function from values to places on the paper, and the values of the ticks."""
        low, high = min(0.0, *values), max(0.0, *values)
        room = 0.04 * (high - low) or 1.0
        low, high = low - room, high + room
        return lambda value: first + (last - first) * (value - low) / (high - low), ticks(low, high, 7)

    px, xs = scale([x for s in every for x in (s.x - s.x_error, s.x + s.x_error)], 60, 440)
    py, ys = scale([y for s in every for y in (s.y - s.y_error, s.y + s.y_error)], 430, 50)
    parts = [f'<rect width="100%" height="100%" fill="white"/><text x="20" y="24" font-weight="bold">{title}</text>']
    if sure:
        left, right, top, bottom = px(-sure), px(sure), py(sure), py(-sure)
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="#eee"/>'
        )
        parts.append(f'<rect x="{right:.1f}" y="50" width="{440 - right:.1f}" height="{top - 50:.1f}" fill="#dcefdc"/>')
        parts.append(f'<text x="{left + 6:.1f}" y="{top + 16:.1f}">level, within the noise</text>')
        parts.append(f'<text x="{right + 6:.1f}" y="66">self-play wins</text>')
    parts.append(f'<path d="M60 50V430H440M{px(0):.1f} 50V430M60 {py(0):.1f}H440" fill="none" stroke="#999"/>')
    parts += [f'<text x="{px(x):.1f}" y="446" text-anchor="middle">{x:.6g}</text>' for x in xs]
    parts += [f'<text x="54" y="{py(y) + 4:.1f}" text-anchor="end">{y:.6g}</text>' for y in ys]
    parts.append(f'<text x="250" y="466" text-anchor="middle">{across} \u2192</text>')
    parts.append(f'<text transform="rotate(-90 16 240)" x="16" y="240" text-anchor="middle">{upwards} \u2192</text>')
    for i, (colour, (entry, some)) in enumerate(zip(COLOURS, spots.items())):
        parts.append(f'<g fill="{colour}" stroke="{colour}"><circle cx="470" cy="{66 + 20 * i}" r="4" stroke="none"/>')
        for path in dict.fromkeys(s.path for s in some if s.path):
            corners = "L".join(f"{px(s.x):.1f} {py(s.y):.1f}" for s in some if s.path == path)
            parts += [f'<path d="M{corners}" fill="none"/>'] * ("L" in corners)
        for s in some:
            bars = f"M{px(s.x - s.x_error):.1f} {py(s.y):.1f}H{px(s.x + s.x_error):.1f}"
            bars += f"M{px(s.x):.1f} {py(s.y - s.y_error):.1f}V{py(s.y + s.y_error):.1f}"
            dot = f'<circle cx="{px(s.x):.1f}" cy="{py(s.y):.1f}" r="4" fill-opacity="0.75" stroke="none">'
            parts.append(f'<path d="{bars}" opacity="0.5"/>{dot}<title>{escape(s.name)}</title></circle>')
        parts.append(f'</g><text x="480" y="{70 + 20 * i}">{escape(entry)} ({len(some)})</text>')
    size = 'width="700" height="480" viewBox="0 0 700 480"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT} font-size="12">{"".join(parts)}</svg>\n'
