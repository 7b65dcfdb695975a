"""The panels of the report page, of metrics.svg and of model cards: values by iterate, and curves by step."""

import statistics
from collections.abc import Sequence

from evaluate import COLUMNS, Row, column
from report.figures import Mark, Panel, sheet
from report.files import RunFiles
from report.tables import number, telling, title_of

NOISE = 12.0  # The axis of a metric spans at least this many paired standard errors.
EQUAL = "at_equal_entropy"
BINS = 120  # the most points of a curve
Runs = Sequence[Sequence[Row]]  # rows of metrics.jsonl of each run


def points(name: str, title: str, runs: Sequence[list[tuple[int, float, float]]], note: str = "") -> Panel:
    """A panel of each run's (iterate, value, standard error of its change from the start)."""
    marks = [[Mark(t, y, y - error, y + error) for t, y, error in some] for some in runs]
    largest = max((error for some in runs for *_, error in some), default=0.0)
    return Panel(title, marks, column(name).format, column(name).better, note, NOISE * largest)


def metric_panel(name: str, runs: Runs) -> Panel:
    """A held-out metric. A bar is one paired standard error of the change from the start."""

    def change(row: Row) -> Sequence[float]:
        return row.get("since_start", {}).get(name, (0.0, 0.0))

    found = [[(row["iterate"], row[name], change(row)[1]) for row in rows if name in row] for rows in runs]
    note = ""
    if len(runs) == 1 and len(found[0]) > 1:
        first, last = (number(name, row[name]) for row in (runs[0][0], runs[0][-1]))
        note = f"{first} \u2192 {last} ({number(name, *change(runs[0][-1]))})"
    return points(name, title_of(name), found, note)


def equal_entropy_panel(name: str, runs: Runs) -> Panel:
    """How much better a sampled metric is than that of the start at the temperature of equal entropy."""
    found = [
        [(0, 0.0, 0.0), *((row["iterate"], *row[EQUAL][name]) for row in rows if name in row.get(EQUAL, {}))]
        for rows in runs
    ]
    note = f": {number(name, *found[0][-1][1:])}" if len(runs) == 1 else ""
    return points(name, f"{name.replace('_', ' ')}, equal entropy", found, f"change from the start{note}")


def held_out_panels(runs: Runs) -> list[Panel]:
    """All held-out metrics, and their gains at equal entropy."""
    names = dict.fromkeys(name for rows in runs for name in telling(rows))
    equal = [name for name in names if any(name in row.get(EQUAL, {}) for rows in runs for row in rows)]
    return [metric_panel(name, runs) for name in names] + [equal_entropy_panel(name, runs) for name in equal]


def signal_panels(runs: Runs) -> list[Panel]:
    """Training signals by iterate, except the numbers of pairs."""
    panels = []
    for name, one in COLUMNS.items():
        if one.kind == "signal" and one.format != "d":
            found = [[(row["iterate"], row[name], 0.0) for row in rows if row.get(name) is not None] for rows in runs]
            panels.append(points(name, title_of(name), found))
    return panels


def step_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """Training signals by step, one iteration after the other."""
    every = [[row for rows in run.steps for row in rows] for run in runs]
    width = max(1.0, max(map(len, every)) * len(runs) / BINS)
    begins: list[tuple[float, str]] = []  # the steps at which a single run's iterations begin
    if len(runs) == 1:
        begins = [(sum(map(len, runs[0].steps[:t])), str(t)) for t, rows in enumerate(runs[0].steps) if rows]
    panels = []
    for name in dict.fromkeys(name for rows in every if rows for name in rows[0]):
        if name not in ("iteration", "step", "skipped"):
            marks = [bins(rows, name, width) for rows in every]
            panels.append(Panel(title_of(name), marks, column(name).format, curves=True, lines=begins))
    return panels


def bins(rows: Sequence[Row], name: str, width: float) -> list[Mark]:
    """Means over `width` neighbouring steps, with a band from the smallest to the largest value."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for step, row in enumerate(rows, 1):
        if row.get(name) is not None:
            groups.setdefault(int(step / width), []).append((step, row[name]))
    columns = [list(zip(*group)) for group in groups.values()]
    return [Mark(statistics.fmean(xs), statistics.fmean(ys), min(ys), max(ys)) for xs, ys in columns]


def figures(runs: Sequence[RunFiles]) -> dict[str, list[Panel]]:
    """All panels of the page by section. A signal that has a curve by step has no panel by iterate."""
    rows, curves = [run.rows for run in runs], step_panels(runs)
    signals = [panel for panel in signal_panels(rows) if panel.name not in {curve.name for curve in curves}]
    sections = {"metrics": held_out_panels(rows), "training": curves + signals}
    return {name: [panel for panel in panels if any(panel.series)] for name, panels in sections.items()}


def plot(rows: Sequence[Row], title: str) -> str:
    """metrics.svg: held-out metrics and training signals by iterate."""
    return sheet(title, [panel for panel in held_out_panels([rows]) + signal_panels([rows]) if any(panel.series)])
