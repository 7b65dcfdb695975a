"""What people read about a run: tables as text, warnings, and a plot as SVG. No dependencies."""

from collections.abc import Sequence
from html import escape
from typing import Any

Row = dict[str, Any]

# The columns of the two tables, and the format of their values.
COLUMNS = dict(iterate="d", greedy=".1%", sampled=".1%", greedy_error=".1%", sampled_error=".1%", nll=".4f", kl=".2f")
COLUMNS |= dict(entropy=".2f")
SIGNALS = dict(iterate="d", pairs="d", identical="d", truncated=".2%", real_length=".1f", generated_length=".1f")
SIGNALS |= dict(loss=".4f", margin=".3f", accuracy=".1%", real_logp=".3f", generated_logp=".3f", grad_norm=".2f")

FALL = 0.1  # nats a token that held-out real responses may lose in an iteration before a warning
CUT = 0.05  # rise of the share of cut responses, from one iteration to the next, before a warning


def tables(rows: Sequence[Row]) -> str:
    """The two tables of a finished run: held-out metrics, and training signals."""
    return (
        f"\nHeld-out metrics \u00b1 one standard error\n{table(rows, COLUMNS)}\n"
        f"\nTraining signals, means over the last tenth of an iteration's steps\n{table(rows[1:], SIGNALS)}"
    )


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Aligned text, one line a row. `columns` maps a row's key to the format of its value.

    A value "x" is written with its standard error if the row has an "x_se". A column that no row has is left out.
    """
    columns = {key: fmt for key, fmt in columns.items() if any(key in row for row in rows)}
    body = [[_cell(row, key, fmt) for key, fmt in columns.items()] for row in rows]
    lines = [[_label(key) for key in columns], *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


def line(row: Row, columns: dict[str, str]) -> str:
    """One row as running text."""
    return ", ".join(f"{_label(key)} {_cell(row, key, fmt)}" for key, fmt in columns.items() if key in row)


def _label(key: str) -> str:
    return key.replace("_", " ")


def _cell(row: Row, key: str, fmt: str) -> str:
    if row.get(key) is None:
        return "-"
    se = row.get(f"{key}_se")
    return format(row[key], fmt) + (f" \u00b1 {format(se, fmt)}" if se is not None else "")


def plot_of(rows: Sequence[Row], title: str) -> str:
    """The plot of a finished run: all metrics and signals that its last iterate has."""
    shown = (COLUMNS | SIGNALS).keys() & rows[-1].keys() - {"iterate", "pairs", "identical"}
    return plot(rows, [key for key in COLUMNS | SIGNALS if key in shown], title)


def plot(rows: Sequence[Row], keys: Sequence[str], title: str) -> str:
    """An SVG with one small panel for each key: its values by row["iterate"], with bars of one standard error."""
    width, height, columns = 240, 180, 4
    lines = -(-len(keys) // columns)
    panels = [
        f'<g transform="translate({20 + i % columns * width} {50 + i // columns * height})">{_panel(rows, key)}</g>'
        for i, key in enumerate(keys)
    ]
    style = "text{font:12px sans-serif;fill:#333}.axis{stroke:#999}.line{stroke:#0b62a4;fill:none;stroke-width:2}"
    size = f'width="{40 + columns * width}" height="{60 + lines * height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="white"/><text x="20" y="26" style="font-size:16px">{escape(title)}'
        f"</text>{''.join(panels)}</svg>\n"
    )


def _panel(rows: Sequence[Row], key: str) -> str:
    """One panel of 200 x 110 in its own coordinates."""
    points = [(row["iterate"], row[key], row.get(f"{key}_se") or 0.0) for row in rows if row.get(key) is not None]
    if not points:
        return ""
    low, high = min(y - se for _, y, se in points), max(y + se for _, y, se in points)
    pad = 0.1 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = low - pad, high + pad
    first, last = min(x for x, _, _ in points), max(x for x, _, _ in points)

    def at(x: float, y: float) -> tuple[float, float]:
        return 44 + 150 * (x - first) / max(last - first, 1), 20 + 100 * (high - y) / (high - low)

    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y, _ in points))
    parts = [
        f'<text x="44" y="10" style="font-weight:bold">{escape(_label(key))}</text>',
        '<line class="axis" x1="38" y1="20" x2="38" y2="120"/><line class="axis" x1="38" y1="120" x2="200" y2="120"/>',
        f'<polyline class="line" points="{path}"/>',
    ]
    for x, y, se in points:
        px, py = at(x, y)
        parts.append(
            f'<line class="line" x1="{px:.1f}" y1="{at(x, y - se)[1]:.1f}" x2="{px:.1f}" y2="{at(x, y + se)[1]:.1f}"/>'
        )
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="#0b62a4"/>')
        parts.append(f'<text x="{px:.1f}" y="136" text-anchor="middle">{x}</text>')
    for y in (low + pad, high - pad):
        parts.append(f'<text x="34" y="{at(0, y)[1] + 4:.1f}" text-anchor="end" style="font-size:10px">{y:.3g}</text>')
    return "".join(parts)


def warnings_of(rows: Sequence[Row]) -> list[str]:
    """Signs of degeneration in the newest iterate's row, each with a remedy."""
    if len(rows) < 2:
        return []
    before, now = rows[-2:]
    name, texts = f"iterate {now['iterate']}", []
    if now["nll"] - before["nll"] > FALL:
        texts.append(
            f"{name}: held-out real responses lost {now['nll'] - before['nll']:.2f} nats a token, the player unlearns "
            f"the data; try a lower --lr, fewer --epochs or a larger --beta"
        )
    if now.get("truncated", 0) - before.get("truncated", now.get("truncated", 0)) > CUT:
        texts.append(
            f"{name}: the share of responses cut at the length limit rose from {before['truncated']:.0%} to "
            f"{now['truncated']:.0%}, the opponent no longer ends them; try --unfinished drop or cut, or a lower --lr"
        )
    if now["skipped"]:
        texts.append(
            f"{name}: steps skipped, since their loss or gradient was not finite: {now['skipped']}; try a lower --lr"
        )
    return texts
