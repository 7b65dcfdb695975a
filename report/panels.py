"""The panels of the report page, of metrics.svg and of model cards: values by iterate, and curves by step."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from evaluate import COLUMNS, Row, column, interpolation
from report.figures import BINS, GREY, Mark, Panel, Series, bins, quantiles, sheet
from report.files import RunFiles
from report.tables import difference, plain, telling, title_of

NOISE = 12.0  # The axis of a metric spans at least this many paired standard errors.
Runs = Sequence[Sequence[Row]]  # rows of metrics.jsonl of each run


def panel(title: str, marks: Iterable[list[Mark]], fmt: str, curve: bool = False, **facts: Any) -> Panel:
    """A panel of each run's marks. Runs without marks keep their colours."""
    series = [Series(some, n, curve) for n, some in enumerate(marks) if some]
    facts = {"x": (0, max([1, *(mark.x for one in series for mark in one.marks)]))} | facts
    return Panel(title, series, fmt.replace("d", ".3g"), **facts)


def measured(x: float, y: float, error: float, note: str) -> Mark:
    return Mark(x, y, (y - error, y + error) if error else (), note=note)


# ---------------------------------------------------------------- by iterate


def metric_panel(name: str, runs: Runs) -> Panel:
    """A held-out metric. A bar is one paired standard error of the change from the start."""

    def mark_of(row: Row) -> Mark:
        change = row.get("since_start", {}).get(name)
        note = f"iterate {row['iterate']}: {plain(row, name)}"
        note += f", {difference(name, change)} against the start" if change else ""
        return measured(row["iterate"], row[name], change[1] if change else 0.0, note)

    note = ""
    if len(runs) == 1:
        first, last = runs[0][0], runs[0][-1]
        change = last.get("since_start", {}).get(name)
        note = f"{plain(first, name)} \u2192 {plain(last, name)} ({difference(name, change)})" if change else ""
    return judged(name, title_of(name), [[mark_of(row) for row in rows if name in row] for rows in runs], note)


def equal_entropy_panel(name: str, runs: Runs) -> Panel:
    """How much better a sampled metric is than that of the start at the temperature of equal entropy."""

    def mark_of(row: Row) -> Mark:
        equal = row["at_equal_entropy"]
        note = f"iterate {row['iterate']}: {difference(name, equal[name])}; start at {equal['temperature']:.2f}"
        return measured(row["iterate"], *equal[name], note)

    every = [[row for row in rows if name in row.get("at_equal_entropy", {})] for rows in runs]
    marks = [[Mark(0, 0.0, note="the start"), *map(mark_of, rows)] for rows in every]
    note = f": {difference(name, every[0][-1]['at_equal_entropy'][name])}" if len(runs) == 1 else ""
    return judged(name, f"{name.replace('_', ' ')}, equal entropy", marks, f"change from the start{note}")


def judged(name: str, title: str, marks: Sequence[list[Mark]], note: str) -> Panel:
    """A panel of a metric, on an axis that keeps noise small."""
    error = max((mark.bar[1] - mark.y for some in marks for mark in some if mark.bar), default=0.0)
    return panel(title, marks, column(name).format, better=column(name).better, note=note, least=NOISE * error)


def frontier_panel(name: str, runs: Runs) -> Panel:
    """A sampled metric against entropy: the start at all temperatures, and the path of the iterates at temperature 1.

    An iterate has learned something if it is on the better side of the start's line. A bar is the standard error of
    its distance to the line.
    """

    def mark_of(row: Row) -> Mark:
        error = row.get("at_equal_entropy", {}).get(name, (0.0, 0.0))[1]
        return measured(row["entropy"], row[name], error, f"iterate {row['iterate']}")

    marks = [[mark_of(row) for row in rows if name in row] for rows in runs]
    xs = [mark.x for some in marks for mark in some]
    lines = [rows[0]["frontier"] for rows in runs if rows and name in rows[0]]
    lines = [near([(p["entropy"], p[name]) for p in line], xs) for n, line in enumerate(lines) if line not in lines[:n]]
    xs += [mark.x for line in lines for mark in line]
    note = "entropy in nats; grey: the start by temperature"
    facts = {"better": column(name).better, "note": note, "x": (min(xs), max(xs)), "whole": False}
    found = panel(f"{title_of(name)} by entropy", marks, column(name).format, **facts)
    found.series = [Series(line, GREY, curve=True) for line in lines if line] + found.series
    return found


def near(line: Sequence[tuple[float, float]], xs: Sequence[float]) -> list[Mark]:
    """The polynomial through all points of a line, as far as the points around `xs`.

    There is no such line if there is one point only, or if two have the same x.
    """
    if len({x for x, _ in line}) < max(len(line), 2):
        return []
    places, values = zip(*sorted(line))
    low = max([x for x in places if x < min(xs)], default=places[0])
    high = min([x for x in places if x > max(xs)], default=places[-1])
    steps = [low + (high - low) * n / 40 for n in range(41)]
    return [Mark(x, sum(w * y for w, y in zip(interpolation(x, places), values))) for x in steps]


def distributions(run: RunFiles) -> Iterator[tuple[str, str, int, list[float]]]:
    """(title, note, iterate, values) of held-out responses against the start and of the pairs that made the iterate."""
    for t, rows in enumerate(run.heldout[1:], 1):
        values = [(old["values"], now["values"]) for old, now in zip(run.heldout[0], rows)]
        real = [old["nll"][0] - now["nll"][0] for old, now in values]
        generated = [-now["kl"][0] for _, now in values]
        yield "log-ratio, real", "log p(real) \u2212 the start's, nats", t, real
        yield "log-ratio, generated", "the same for the start's own response, nats", t, generated
        yield "held-out margin", "the first minus the second, nats", t, [a - b for a, b in zip(real, generated)]
    for t, pairs in enumerate(run.pairs, 1):
        real = [(pair["real_ids"], pair["opponent_real_logp"]) for pair in pairs]
        several = [(pair["generated_ids"], pair["opponent_generated_logps"]) for pair in pairs]
        generated = [one for ids, logps in several for one in itertools.zip_longest(ids, logps)]
        for whose, some in (("real", real), ("generated", generated)):
            per_token = [logp / len(ids) for ids, logp in some if logp is not None]
            yield f"length, {whose}", "tokens of a pair's response", t, [len(ids) for ids, _ in some]
            yield f"log p per token, {whose}", "before the iteration, nats", t, per_token


def distribution_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """The distributions, and shares of an iteration's generated responses."""
    marks: dict[tuple[str, str], list[list[Mark]]] = {}
    for n, run in enumerate(runs):
        for title, note, t, values in distributions(run):
            marks.setdefault((title, note), [[] for _ in runs])[n] += [quantiles(t, values)] if values else []
    panels = [panel(title, some, ".3g", note=note, least=1.0) for (title, note), some in marks.items()]
    shares: dict[str, Callable[[Row], float]] = {
        "identical to the real": lambda row: row["identical"] / row["generated"],
        "dropped": lambda row: 1 - row["pairs"] / row["generated"],
        "truncated": lambda row: row["truncated"],
    }
    generated = [[row for row in run.rows if row.get("generated")] for run in runs]
    note = "share of generated responses"
    return panels + [value_panel(*share, generated, ".1%", note=note, least=0.05) for share in shares.items()]


def value_panel(title: str, value: Callable[[Row], float | None], runs: Runs, fmt: str, **facts: Any) -> Panel:
    """A number without an error, of the rows that have it."""
    found = [[(row["iterate"], value(row)) for row in rows] for rows in runs]
    marks = [[Mark(x, y, note=f"{y:{fmt}}") for x, y in some if y is not None] for some in found]
    return panel(title, marks, fmt, **facts)


# ---------------------------------------------------------------- by step


def step_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """Training signals by step, one iteration after the other."""
    every = [[row for rows in run.steps for row in rows] for run in runs]
    total = max(map(len, every))
    lines = []
    if len(runs) == 1:
        starts = [(t, sum(map(len, runs[0].steps[:t]))) for t, rows in enumerate(runs[0].steps) if rows]
        lines = [(start, f"iteration {t}" if len(starts) < 6 else str(t)) for t, start in starts]
    panels = []
    for name in dict.fromkeys(name for rows in every if rows for name in rows[0]):
        if name not in ("iteration", "step", "skipped"):
            values = [[(i, row[name]) for i, row in enumerate(rows, 1) if row.get(name) is not None] for rows in every]
            marks = [bins(some, total / BINS * len(runs)) for some in values]
            panels.append(panel(title_of(name), marks, column(name).format, True, x=(0, total), lines=lines))
    return panels


# ---------------------------------------------------------------- all of them


def held_out_panels(runs: Runs) -> list[Panel]:
    """All held-out metrics, and their gains at equal entropy."""
    names = dict.fromkeys(name for rows in runs for name in telling(rows))
    equal = [name for name in names if any(name in row.get("at_equal_entropy", {}) for rows in runs for row in rows)]
    return [metric_panel(name, runs) for name in names] + [equal_entropy_panel(name, runs) for name in equal]


def figures(runs: Sequence[RunFiles]) -> dict[str, list[Panel]]:
    """All panels of the page by section."""
    rows = [run.rows for run in runs]
    sampled = dict.fromkeys(name for some in rows for name in telling(some) if name.startswith("sampled"))
    frontiers = [frontier_panel(name, rows) for name in sampled]
    sections = {
        "metrics": held_out_panels(rows) + [one for one in frontiers if one.series[0].curve],
        "training": step_panels(runs),
        "distributions": distribution_panels(runs),
    }
    return {name: [one for one in panels if one.series] for name, panels in sections.items()}


def plot(rows: Sequence[Row], title: str) -> str:
    """metrics.svg: held-out metrics and training signals by iterate."""
    panels = held_out_panels([rows])
    for name, one in COLUMNS.items():
        if one.kind == "signal" and one.format != "d":
            panels.append(value_panel(title_of(name), lambda row, name=name: row.get(name), [rows], one.format))
    return sheet(title, [one for one in panels if one.series])
