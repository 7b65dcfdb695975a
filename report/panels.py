"""The panels of the report page, of metrics.svg and of model cards: values by iterate, and curves by step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evaluate import COLUMNS, Row, column, interpolation
from report.figures import BINS, GREY, Mark, Panel, Series, bins, quantiles, sheet
from report.files import RunFiles
from report.tables import difference, plain, telling, title_of

NOISE = 12.0  # The axis of a metric spans at least this many paired standard errors.

Rows = Mapping[str, Sequence[Row]]  # rows of metrics.jsonl by the run's name


def panel(title: str, marks: Iterable[list[Mark]], fmt: str, curve: bool = False, **facts: Any) -> Panel:
    """A panel of each run's marks. Runs without marks keep their colours."""
    series = [Series(some, n, curve) for n, some in enumerate(marks) if some]
    return Panel(title, series, fmt.replace("d", ".3g"), **facts)


def measured(x: float, y: float, error: float, note: str) -> Mark:
    return Mark(x, y, (y - error, y + error), note=note)


# ---------------------------------------------------------------- by iterate


def metric_panel(name: str, runs: Rows) -> Panel:
    """A held-out metric. A bar is one paired standard error of the change from the start."""

    def mark_of(row: Row) -> Mark:
        change = row.get("since_start", {}).get(name)
        note = f"iterate {row['iterate']}: {plain(row, name)}"
        note += f", {difference(name, *change)} against the start" if change else ""
        return measured(row["iterate"], row[name], change[1] if change else 0.0, note)

    every = [[row for row in rows if name in row] for rows in runs.values()]
    marks = [[mark_of(row) for row in rows] for rows in every]
    paired = max(mark.bar[1] - mark.y for some in marks for mark in some)
    single = max(row.get(f"{name}_se", 0.0) for rows in every for row in rows)
    note = ""
    if len(runs) == 1 and name in every[0][-1].get("since_start", {}):
        change = difference(name, *every[0][-1]["since_start"][name])
        note = f"{plain(every[0][0], name)} \u2192 {plain(every[0][-1], name)} ({change})"
    facts = {"better": column(name).better, "note": note, "least": NOISE * (paired or single / 2)}
    return panel(title_of(name), marks, column(name).format, **facts)


def equal_entropy_panel(name: str, runs: Rows) -> Panel:
    """How much better a sampled metric is than that of the start at the temperature of equal entropy."""

    def mark_of(row: Row) -> Mark:
        equal = row["at_equal_entropy"]
        note = f"iterate {row['iterate']}: {difference(name, *equal[name])}; start at {equal['temperature']:.2f}"
        return measured(row["iterate"], *equal[name], note)

    every = [[row for row in rows if name in row.get("at_equal_entropy", {})] for rows in runs.values()]
    marks = [[Mark(0, 0.0, note="the start"), *map(mark_of, rows)] for rows in every]
    change, error = next(rows for rows in every if rows)[-1]["at_equal_entropy"][name]
    note = "change from the start" + (f": {difference(name, change, error)}" if len(runs) == 1 else "")
    facts = {"better": column(name).better, "note": note, "least": NOISE * error}
    return panel(f"{name.replace('_', ' ')}, equal entropy", marks, column(name).format, **facts)


def frontier_panel(name: str, runs: Rows) -> Panel:
    """A sampled metric against entropy: the start at all temperatures, and the path of the iterates at temperature 1.

    An iterate has learned something if it is on the better side of the start's line. A bar is the standard error of
    its distance to the line.
    """

    def mark_of(row: Row) -> Mark:
        error = row.get("at_equal_entropy", {}).get(name, (0.0, 0.0))[1]
        return measured(row["entropy"], row[name], error, f"iterate {row['iterate']}")

    marks = [[mark_of(row) for row in rows if name in row] for rows in runs.values()]
    xs = [mark.x for some in marks for mark in some]
    lines = [rows[0].get("frontier", []) for rows in runs.values() if name in rows[0]]
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
    if len(line) < 2 or len({x for x, _ in line}) < len(line):
        return []
    places, values = zip(*sorted(line))
    low = max([x for x in places if x < min(xs)], default=places[0])
    high = min([x for x in places if x > max(xs)], default=places[-1])
    steps = [low + (high - low) * n / 40 for n in range(41)]
    return [Mark(x, sum(w * y for w, y in zip(interpolation(x, places), values))) for x in steps]


def distribution_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """Log-ratios of held-out responses, and lengths and the opponent's log-probabilities of pairs."""
    notes = {
        "log-ratio, real": "log p(real) \u2212 the start's, nats",
        "log-ratio, generated": "the same for the start's own response, nats",
        "held-out margin": "the first minus the second, nats",
    }
    every: dict[str, list[list[Mark]]] = {name: [[] for _ in runs] for name in notes}
    for n, run in enumerate(runs):
        for t in [t for t in run.heldout if t and 0 in run.heldout]:
            values = [(old["values"], now["values"]) for old, now in zip(run.heldout[0], run.heldout[t])]
            real = [old["nll"][0] - now["nll"][0] for old, now in values]
            generated = [-now["kl"][0] for _, now in values]
            margins = [a - b for a, b in zip(real, generated)]
            for marks, some in zip(every.values(), (real, generated, margins)):
                marks[n] += quantiles(t, some, ".2f")
    panels = [panel(name, marks, ".2f", note=notes[name], least=1.0) for name, marks in every.items()]
    return panels + (pair_panels(runs[0]) if len(runs) == 1 else []) + share_panels(runs)


def pair_panels(run: RunFiles) -> list[Panel]:
    """Real responses in the first colour and generated ones in the second."""
    lengths: list[list[Mark]] = [[], []]
    logps: list[list[Mark]] = [[], []]
    for t, rows in run.pairs.items():
        responses = [[(row["real_ids"], row.get("opponent_real_logp")) for row in rows], generated_responses(rows)]
        for n, some in enumerate(responses):
            lengths[n] += quantiles(t + 1, [len(ids) for ids, _ in some], ".0f")
            logps[n] += quantiles(t + 1, [logp / len(ids) for ids, logp in some if logp is not None], ".2f")
    return [
        panel("length", lengths, ".0f", note="tokens of a pair's responses"),
        panel("log p per token", logps, ".2f", note="before the iteration, nats"),
    ]


def generated_responses(pairs: Sequence[Row]) -> list[tuple[list[int], float | None]]:
    """(ids, the opponent's log-probability or None) of all generated responses."""
    found = []
    for row in pairs:
        several = row["generated_ids"]
        found += zip(several, row.get("opponent_generated_logps") or [None] * len(several))
    return found


def share_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """Shares of an iteration's generated responses."""
    shares: dict[str, Callable[[Row], float]] = {
        "identical to the real": lambda row: row["identical"] / row["generated"],
        "dropped": lambda row: 1 - row["pairs"] / row["generated"],
        "truncated": lambda row: row["truncated"],
    }
    panels = []
    for name, share in shares.items():
        every = []
        for run in runs:
            values = [(row["iterate"], share(row)) for row in run.rows if row.get("generated")]
            every.append([Mark(x, y, note=f"{y:.2%}") for x, y in values])
        panels.append(panel(name, every, ".1%", note="share of generated responses", least=0.05))
    return panels


def signal_panels(rows: Sequence[Row]) -> list[Panel]:
    """Training signals by iterate, but for counts."""
    panels = []
    for name, one in COLUMNS.items():
        if one.kind == "signal" and one.format != "d":
            marks = [Mark(row["iterate"], row[name]) for row in rows if row.get(name) is not None]
            panels.append(panel(title_of(name), [marks], one.format))
    return panels


# ---------------------------------------------------------------- by step


def step_panels(runs: Sequence[RunFiles]) -> list[Panel]:
    """Training signals by step, one iteration after the other."""
    lengths = [[len(steps) for steps in run.steps.values()] for run in runs]
    total = max((sum(some) for some in lengths), default=0)
    if not total:
        return []
    starts = [sum(lengths[0][:t]) for t in range(len(lengths[0]))]
    lines = [(start, f"iteration {t}" if len(starts) < 6 else str(t)) for t, start in enumerate(starts)]
    lines = lines if all(some == lengths[0][: len(some)] for some in lengths) else []
    rows = [[row for steps in run.steps.values() for row in steps] for run in runs]
    found = dict.fromkeys(name for some in rows for name in (some or [{}])[0])
    known = [name for name in COLUMNS if name in found]
    others = [name for name in found if name not in (*COLUMNS, "iteration", "step", "skipped")]
    panels = []
    for name in known + others:
        values = [[(i, row.get(name)) for i, row in enumerate(some, 1)] for some in rows]
        marks = [bins([(x, y) for x, y in some if y is not None], total / BINS * len(runs)) for some in values]
        panels.append(panel(title_of(name), marks, column(name).format, curve=True, x=(0, total), lines=lines))
    return panels


# ---------------------------------------------------------------- all of them


def by_iterate(panels: Iterable[Panel], last: int) -> list[Panel]:
    """The panels that show anything, on axes from the start to the last iterate."""
    shown = [one for one in panels if one.series]
    for one in shown:
        one.x = (0, max(last, 1))
    return shown


def held_out_panels(runs: Rows) -> list[Panel]:
    """All held-out metrics, and their gains at equal entropy."""
    names = dict.fromkeys(name for rows in runs.values() for name in telling(rows))
    rows = [row for rows in runs.values() for row in rows]
    equal = [name for name in names if any(name in row.get("at_equal_entropy", {}) for row in rows)]
    return [metric_panel(name, runs) for name in names] + [equal_entropy_panel(name, runs) for name in equal]


def figures(runs: Sequence[RunFiles]) -> dict[str, list[Panel]]:
    """All panels of the page by section."""
    last = max(run.last for run in runs)
    rows = {run.name: run.rows for run in runs if run.rows}
    sampled = dict.fromkeys(name for some in rows.values() for name in telling(some) if name.startswith("sampled"))
    frontiers = [frontier_panel(name, rows) for name in sampled]
    return {
        "metrics": by_iterate(held_out_panels(rows), last) + [one for one in frontiers if one.series[0].curve],
        "training": [one for one in step_panels(runs) if one.series],
        "distributions": by_iterate(distribution_panels(runs), last),
    }


def plot(rows: Sequence[Row], title: str) -> str:
    """metrics.svg: held-out metrics and training signals by iterate."""
    return sheet(title, by_iterate(held_out_panels({"": rows}) + signal_panels(rows), rows[-1]["iterate"]))
