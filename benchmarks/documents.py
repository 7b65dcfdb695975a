"""What both reports of evidence share: blocks of the documents, tables, and a figure."""

import re
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from measuring import ROOT

DOCUMENTS = ("docs/evidence.md", "README.md")
COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b0548b", "#8a6d00", "#56b4e9", "#444444", "#c0a000", "#7a4ad0")
Columns = dict[str, str | Callable[[Any], str]]  # by title: a function of a row, or a format string of its fields
Mark = tuple[str, float, float, str]  # its name in the legend, its leads to the right and upwards, what it is
MOST = 8.0  # standard errors at the edge of a figure
STYLE = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999}.small{font-size:10px}.bold{font-weight:bold}"


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


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "small") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def figure(title: str, across: str, upwards: str, marks: Iterable[Mark], sure: float, note: str) -> str:
    """Leads in two respects, in standard errors, as SVG: marks in a square, and a legend to its right.

    `note` stands in the corner of marks that lead in both respects by more than `sure`.
    """

    def at(value: float) -> float:  # from the middle of the square
        return 190 * max(-1.0, min(1.0, value / MOST))

    wide = 190 - at(sure)
    sides = [label(250, 464, f"{across} \u2192", "middle"), label(16, 240, f"{upwards} \u2192", "middle")]
    place = f'x="{250 - at(sure):.1f}" y="{240 - at(sure):.1f}"'
    parts = [
        '<rect width="100%" height="100%" fill="white"/>',
        f'<rect x="{250 + at(sure):.1f}" y="50" width="{wide:.1f}" height="{wide:.1f}" fill="#dcefdc"/>',
        f'<rect {place} width="{2 * at(sure):.1f}" height="{2 * at(sure):.1f}" fill="#eee"/>',
        label(440 - wide / 2, 66, note, "middle"),
        label(250, 254 - at(sure), "level, within the noise", "middle"),
        label(20, 22, title, kind="bold"),
        f'{sides[0]}<g transform="rotate(-90 16 240)">{sides[1]}</g>',
        '<path class="axis" fill="none" d="M60 50V430H440"/>',
    ]
    for value in (-6, -3, 0, 3, 6):
        parts.append(f'<path class="axis" d="M{250 + at(value):.1f} 430v4M56 {240 - at(value):.1f}h4"/>')
        parts.append(label(250 + at(value), 446, str(value), "middle") + label(52, 244 - at(value), str(value), "end"))
    series: dict[str, list[Mark]] = {}
    for mark in marks:
        series.setdefault(mark[0], []).append(mark)
    for colour, y, (name, some) in zip(COLOURS, range(66, 430, 20), series.items()):
        circle = f'r="4" fill="{colour}" fill-opacity="0.75"'
        parts.append(f'<circle cx="470" cy="{y}" {circle}/>{label(480, y + 4, f"{name} ({len(some)})")}')
        for _, right, up, text in some:
            spot = f'cx="{250 + at(right):.1f}" cy="{240 - at(up):.1f}"'
            parts.append(f"<circle {spot} {circle}><title>{escape(text)}</title></circle>")
    parts.append(label(460, 430, "Marks on the edge lie beyond it."))
    size = 'width="680" height="480" viewBox="0 0 680 480"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(parts)}</svg>\n'
